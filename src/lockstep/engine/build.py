"""Build this rank's Megatron model from the model's config and the parallel sizes, and load its
weights through the weight contract.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityFuncOp
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from lockstep.config.megatron import Parallel
from lockstep.engine.layers.attention import CoreAttention, TreeAttention
from lockstep.engine.layers.gated_delta_net import GatedDeltaNet
from lockstep.engine.layers.linear import ColumnLinear, RowLinear
from lockstep.engine.layers.mlp import GatedMLP
from lockstep.engine.layers.moe import MoE
from lockstep.engine.layers.norm import RMSNorm
from lockstep.engine.model import Layer, Model
from lockstep.engine.parallel import groups
from lockstep.engine.parallel.device import CUDA
from lockstep.models.config import ModelConfig
from lockstep.models.contract import Sizes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def sizes_here() -> Sizes:
    """This rank's sizes and coordinates, from Megatron's process groups."""
    return Sizes(
        tp=groups.tensor().size(),
        tp_rank=groups.tensor().rank(),
        ep=groups.expert().size(),
        ep_rank=groups.expert().rank(),
        etp=groups.expert_tensor().size(),
        etp_rank=groups.expert_tensor().rank(),
        pp=groups.pipeline().size(),
        pp_rank=groups.pipeline().rank(),
    )


def transformer_config(config: ModelConfig, parallel: Parallel, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration. Every fusion that needs TransformerEngine or apex is off.

    Megatron sees one pipeline stage only: stages, their schedule and the tied embedding across them
    are ours (`pipeline.py`).
    """
    moe: dict[str, Any] = {}
    if config.is_moe:
        moe = {
            "num_moe_experts": config.experts,
            "moe_router_topk": config.experts_per_token,
            "moe_ffn_hidden_size": config.expert_size,
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_router_dtype": "fp32",
            "moe_router_pre_softmax": True,
            "moe_shared_expert_intermediate_size": config.shared_expert_size or None,
            "moe_enable_routing_replay": True,
            "expert_model_parallel_size": parallel.expert,
            "expert_tensor_parallel_size": parallel.expert_tensor,
        }
    made = TransformerConfig(
        num_layers=config.layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.heads,
        num_query_groups=config.kv_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.mlp_size or config.expert_size,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        layernorm_zero_centered_gamma=config.zero_centered_norm,
        qk_layernorm=config.qk_norm,
        attention_output_gate=config.output_gate,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        use_cpu_initialization=not CUDA,
        perform_initialization=False,
        params_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel,
        transformer_impl="local",
        **moe,
    )
    # Set afterwards: Megatron refuses one expert per token with normalised weights, which models do
    # have (the weight is then 1).
    made.moe_router_pre_softmax = not config.norm_topk_prob
    return made


def _attention_spec(config: ModelConfig) -> ModuleSpec:
    norm = RMSNorm if config.qk_norm else None
    return ModuleSpec(
        module=TreeAttention,
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnLinear,  # pyright: ignore[reportArgumentType]
            core_attention=CoreAttention,  # pyright: ignore[reportArgumentType]
            linear_proj=RowLinear,
            q_layernorm=norm,  # pyright: ignore[reportArgumentType]
            k_layernorm=norm,  # pyright: ignore[reportArgumentType]
        ),
    )


def _layer_spec(config: ModelConfig, number: int) -> ModuleSpec:
    mixer = _attention_spec(config)
    mlp: Any = GatedMLP  # classes and not specs: Megatron would look for arguments that only its own layers take
    if config.layer_types[number] == "linear_attention":
        mixer = ModuleSpec(module=GatedDeltaNet, params={"model": config})
    if config.moe_layers[number]:
        mlp = MoE
    return ModuleSpec(
        module=Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=mixer,
            self_attn_bda=IdentityFuncOp,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=IdentityFuncOp,
        ),
    )


def build(config: ModelConfig, parallel: Parallel, dtype: torch.dtype, layers: range, recompute: bool = False) -> Model:
    """An unloaded model of the layers `layers` (this pipeline stage), parameters allocated on the
    engine's device, none trainable.
    """
    RouterReplay.clear_global_router_replay_instances()  # Megatron's list of routers belongs to one model
    megatron_config = transformer_config(config, parallel, dtype)
    first, last = layers.start == 0, layers.stop == config.layers
    padded = -(-config.vocab_size // parallel.tensor) * parallel.tensor
    model = Model(
        config=megatron_config,
        transformer_layer_spec=TransformerBlockSubmodules(  # pyright: ignore[reportArgumentType]
            layer_specs=[_layer_spec(config, number) for number in layers],
            layer_norm=RMSNorm,  # pyright: ignore[reportArgumentType]
        ),
        vocab_size=padded,
        max_sequence_length=config.max_positions,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=config.tied,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        rope=config.rope,
    )
    model.requires_grad_(False)
    for number, layer in zip(layers, model.decoder.layers, strict=True):
        layer.recompute = recompute  # pyright: ignore
        if config.moe_layers[number]:
            layer.mlp.number = sum(config.moe_layers[:number])  # pyright: ignore
    return model
