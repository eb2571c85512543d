"""The fields of a `config.json` that are read, and those without effect."""

from __future__ import annotations

MTP_FIELDS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")

_READ_NAMES = """
    architectures model_type text_config vocab_size hidden_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim intermediate_size hidden_act rms_norm_eps max_position_embeddings tie_word_embeddings
    rope_parameters rope_theta rope_scaling partial_rotary_factor attention_bias mlp_bias attention_dropout layer_types
    full_attention_interval attn_output_gate use_sliding_window sliding_window num_experts num_local_experts
    num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size norm_topk_prob decoder_sparse_step
    mlp_only_layers linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim
    linear_conv_kernel_dim eos_token_id quantization_config
"""
READ = frozenset(_READ_NAMES.split()) | frozenset(MTP_FIELDS)
"""Fields that decide the model's mathematics or tokens; every value is checked."""

_IGNORED_NAMES = """
    transformers_version torch_dtype dtype use_cache initializer_range bos_token_id pad_token_id vision_config
    image_token_id video_token_id vision_start_token_id vision_end_token_id output_router_logits router_aux_loss_coef
    max_window_layers mamba_ssm_dtype mtp_use_dedicated_embeddings pretraining_tp language_model_only _name_or_path
    chunk_size_feed_forward id2label label2id is_encoder_decoder output_attentions output_hidden_states return_dict
    problem_type
"""
IGNORED = frozenset(_IGNORED_NAMES.split())
"""Fields without effect here: storage, generation, other modalities, losses we don't use."""
