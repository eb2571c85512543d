"""`lockstep import-gguf`: what comes out is what transformers' own loader reads, or one line says why nothing does."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from conversations import CONVERSATIONS
from gguf_files import write_gguf
from lockstep.cli.base_models.real_model import smollm2_gguf
from lockstep.errors import ConfigError, LockstepError, UnsupportedModelError, WeightsError
from lockstep.models.gguf.convert import import_gguf
from lockstep.models.registry import load_model_config
from lockstep.models.tiny.write import write_tiny


@pytest.fixture(scope="module")
def theirs():
    """(model in fp32, tokenizer) as transformers loads the GGUF file by itself."""
    file = smollm2_gguf()
    names = {"gguf_file": file.name, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(file.parent, **names).eval()
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def test_a_real_model_computes_what_transformers_own_loader_computes(theirs, tmp_path):
    """fp32 logits of whole conversations, whose ids and template agree, too."""
    folder = import_gguf(smollm2_gguf(), tmp_path / "smollm2", "float32")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    for messages in CONVERSATIONS[:4]:
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        assert ids == theirs[1].apply_chat_template(messages, return_dict=False)
        with torch.no_grad():
            ours_SV, theirs_SV = (loaded(torch.tensor([ids])).logits[0] for loaded in (model, theirs[0]))
        torch.testing.assert_close(ours_SV, theirs_SV, atol=1e-4, rtol=0)


def test_bf16_weights_are_transformers_rounded_once(theirs, smollm2):
    stored = load_file(smollm2 / "model.safetensors")
    loaded = {name: tensor for name, tensor in theirs[0].state_dict().items() if name != "lm_head.weight"}
    assert set(stored) == set(loaded)
    assert all(torch.equal(stored[name], loaded[name].to(torch.bfloat16)) for name in stored)
    assert len(AutoTokenizer.from_pretrained(smollm2)) <= load_model_config(str(smollm2)).vocab_size


def test_text_is_split_as_the_file_names(theirs, smollm2):
    """Digits stand alone; transformers' loader knows no rule for this file and differs after two spaces."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for text in ("It's 12 o'clock.", "naïve café 東京 🙂", "def f(x):\n\treturn x<|im_end|>", "98 + 93 = 191"):
        assert tokenizer(text)["input_ids"] == theirs[1](text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  23")["input_ids"]) == ["a", "ĠĠ", "2", "3"]
    assert tokenizer.convert_ids_to_tokens(range(49152)) == theirs[1].convert_ids_to_tokens(range(49152))


@pytest.mark.parametrize(("family", "architecture"), [("qwen3", "qwen3"), ("qwen3_moe", "qwen3moe")])
def test_a_checkpoint_survives_the_way_there_and_back(tmp_path, family, architecture):
    made = write_tiny(family, tmp_path / "made", seed=random.randrange(1000))
    folder = import_gguf(write_gguf(made, tmp_path / "made.gguf", architecture), tmp_path / "back", "float32")
    ids = torch.randint(3, 300, (2, 30))
    with torch.no_grad():
        old, new = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits for f in (made, folder))
    torch.testing.assert_close(new, old, atol=1e-6, rtol=0)
    text = "yes, the answer is no 12"
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(made)(text)


def _scaled(writer):
    writer.add_string("qwen3.rope.scaling.type", "yarn")


def _window(writer):
    writer.add_uint32("qwen3.attention.sliding_window", 128)


def _stray(writer):
    writer.add_tensor("blk.0.attn_q.bias", np.zeros(4, np.float32))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"architecture": "gemma3"}, UnsupportedModelError, "architecture 'gemma3'; import-gguf converts llama, qwen3"),
        ({"change": _scaled}, UnsupportedModelError, "scales its rotary angles"),
        ({"change": _window}, UnsupportedModelError, "sets qwen3.attention.sliding_window"),
        ({"change": _stray}, WeightsError, "blk.0.attn_q.bias"),
        ({"leave_out": ("blk.1.ffn_up.weight",)}, WeightsError, "model.layers.1.mlp.up_proj.weight missing"),
        ({"leave_out": ("token_embd.weight",)}, WeightsError, "has no token_embd.weight"),
        ({"metadata": {"embedding_length": 32}}, WeightsError, "config.json implies"),
    ],
)
def test_what_would_be_wrong_is_refused_in_one_line(tmp_path, change, error, says):
    made = write_tiny("qwen3", tmp_path / "made")
    file = write_gguf(made, tmp_path / "x.gguf", **{"architecture": "qwen3", **change})
    with pytest.raises(error) as raised:
        import_gguf(file, tmp_path / "out")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "x.gguf"]


def test_a_damaged_file_is_refused_wherever_it_was_cut(tmp_path):
    made = write_tiny("qwen3", tmp_path / "made")
    data = write_gguf(made, tmp_path / "x.gguf", "qwen3").read_bytes()
    for length in (0, 3, 4, 12, 24, *(random.randrange(25, len(data) - 1) for _ in range(12)), len(data) - 1):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(LockstepError, match=r"cut\.gguf") as raised:
            import_gguf(tmp_path / "cut.gguf", tmp_path / "out")
        assert "\n" not in str(raised.value), length
        assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="is not empty"):
        import_gguf(tmp_path / "x.gguf", made)
