"""Tiny checkpoints: the same bytes for the same seed, every field settable, logits and routed experts with something to say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lockstep.errors import ConfigError
from lockstep.models.registry import load_model_config
from lockstep.models.tiny.write import parse_override, tiny_config, tiny_models, write_tiny

KEYS = tuple(tiny_models())


@pytest.mark.parametrize("key", KEYS)
def test_bytes_follow_from_seed_and_fields(key: str, tmp_path: Path) -> None:
    first, again, other = (write_tiny(key, tmp_path / n, seed=s) for n, s in (("a", 3), ("b", 3), ("c", 4)))
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    assert sum(p.stat().st_size for p in first.iterdir()) < 8e6


@pytest.mark.parametrize("key", KEYS)
def test_outputs_are_neither_flat_nor_certain(key: str, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(write_tiny(key, tmp_path / "a"), dtype=torch.float32)
    tokens = torch.randint(3, 300, (4, 48), generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda m, i, o: seen.append(o[0] if isinstance(o, tuple) else o))
    with torch.no_grad():
        logits = model(tokens).logits
    assert 1.0 < logits.std() < 2.5
    top = logits.softmax(-1).amax(-1).mean()
    assert 0.02 < top < 0.5
    for scores in seen:
        chosen = scores.flatten(0, -2).topk(2, -1).indices
        load = torch.bincount(chosen.flatten(), minlength=8)
        assert (load > 0).sum() >= 6, "some experts never run"
    assert bool(seen) == key.endswith("moe")


@pytest.mark.parametrize("key", KEYS)
def test_every_family_takes_the_head_dim_that_releases_set(key: str, tmp_path: Path) -> None:
    """transformers declares no such field for Qwen3's mixture, whose releases set it nevertheless."""
    folder = write_tiny(key, tmp_path / "model", overrides={"head_dim": 48, "num_hidden_layers": 4})
    config = load_model_config(folder)
    assert config.head_dim == 48
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {n: file.get_slice(n).get_shape() for n in file.keys() if n.endswith("k_proj.weight")}  # noqa: SIM118
    assert {shape[0] for shape in shapes.values()} == {48 * config.kv_heads}


def test_any_field_can_be_set_and_no_other(tmp_path: Path) -> None:
    given_fields = dict(
        map(parse_override, ["num_hidden_layers=2", "rope_theta=1e6", "tie_word_embeddings=true", "dtype=bfloat16"])
    )
    folder = write_tiny("qwen3_5_moe", tmp_path / "a", overrides=given_fields)
    raw = json.loads((folder / "config.json").read_text())
    assert (raw["num_hidden_layers"], raw["layer_types"]) == (2, ["linear_attention"] * 2)
    assert raw["rope_parameters"]["rope_theta"] == 1e6
    with pytest.raises(ConfigError, match=r"num_layers is no field of Qwen3Config; known: .*num_hidden_layers"):
        write_tiny("qwen3", tmp_path / "b", overrides={"num_layers": 2})
    with pytest.raises(ConfigError, match="vocab_size 200 is smaller"):
        write_tiny("qwen3", tmp_path / "b", overrides={"vocab_size": 200})
    with pytest.raises(ConfigError, match=r"no tiny family 'qwen9'; known: .*qwen3"):
        write_tiny("qwen9", tmp_path / "b")
    with pytest.raises(ConfigError, match="is not KEY=VALUE"):
        parse_override("vocab_size")
    with pytest.raises(ConfigError, match="is not empty"):
        write_tiny("qwen3", folder)


@pytest.fixture(scope="module", params=KEYS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return transformers.AutoTokenizer.from_pretrained(write_tiny(request.param, tmp_path_factory.mktemp("t") / "a"))


@settings(max_examples=40, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
@example(text="e\u0301 \uf900")
def test_text_survives_the_tokenizer(tokenizer, text: str) -> None:
    """As it is, or in NFC: transformers loads Qwen3.5's own class for some of its model types, whatever tokenizer was saved."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    assert normalizer is None or type(normalizer).__name__ == "NFC"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert max(tokens, default=0) < len(tokenizer) <= 320
    expected = text if normalizer is None else normalizer.normalize_str(text)
    assert tokenizer.decode(tokens, skip_special_tokens=False) == expected


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "clock"}}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "yes or no?"},
    {"role": "assistant", "content": "wait", "tool_calls": [CALL]},
    {"role": "tool", "content": "12:00"},
    {"role": "assistant", "content": "maybe"},
    {"role": "user", "content": "thanks"},
]


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "look"}}]])
@pytest.mark.parametrize("start", [0, 1])
def test_chat_template_grows_by_appending(tokenizer, tools: list | None, start: int) -> None:
    """A conversation's tokens are the start of its continuation's, so that turns can be trained on as one sequence."""

    def render(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            TALK[start:count], tools=tools, add_generation_prompt=prompt, tokenize=False
        )

    for count in range(start + 2, len(TALK)):
        follows = TALK[count]["role"] == "assistant"
        assert render(count + 1, False).startswith(render(count, follows))
    conversation = render(len(TALK), True)
    for part in ("yes or no?", '"name": "look"', "12:00", "maybe", "<|im_end|>"):
        assert part in conversation
    assert ("Be brief." in conversation) is (start == 0)
    assert conversation.endswith("<|im_start|>assistant\n")
    tokens = tokenizer.encode(conversation)
    assert tokens.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == conversation.count("<|im_end|>")
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_b8_a_renamed_field_is_known_by_both_names(tmp_path):
    """transformers 5.19 calls Qwen3-MoE's `num_experts` `num_local_experts`; a config.json and a user may say either."""
    names = {"num_experts"} | {
        old for pair in tiny_config("qwen3_moe", {}).attribute_map.items() for old in pair if "experts" in old
    }
    for name in sorted(names):
        folder = write_tiny("qwen3_moe", tmp_path / name, overrides={name: 16, "num_hidden_layers": 2})
        assert load_model_config(str(folder)).experts == 16
