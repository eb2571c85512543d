"""The vLLM parsers that a tokenizer can serve, found without starting anything.

vLLM 0.32 makes the chosen parser at the end of its start, and then dies if
the vocabulary lacks a token that the parser needs. `tests/unit/inference/test_parsers.py` compares
both tables below with vLLM's own.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lockstep.errors import ConfigError
from lockstep.inference.tokenizer_files import TokenizerFiles, argument

_NO_TOKENS = """
    apertus deepseek_v32 deepseek_v4 deepseek_v41 dots ernie45 functiongemma gemma4 gigachat3 glm45 glm47 granite
    granite-20b-fc granite4 hermes hf hunyuan_a13b inkling internlm k2_horizon kimi_k2 kimi_k3 ling3 llama4_pythonic longcat
    mimo minicpm5 minimax_m2 minimax_m3 muse_glimmer olmo3 openai phi4_mini_json plamo3 poolside_v1 pythonic qwen3_coder
    qwen3_json qwen3_xml seed_oss step3 step3p5 xlam
"""
_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_CALLS = ("<tool_calls>", "</tool_calls>")
TOOL_PARSERS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_NO_TOKENS.split(), ()),
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v31": _DEEPSEEK,
    "hy_v3": _CALLS,
    "hy_v4": _CALLS,
    "jamba": _CALLS,
    "lfm2": ("<|tool_call_start|>", "<|tool_call_end|>"),
    "llama3_json": ("<|python_tag|>",),
    "llama4_json": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]",),
}
"""vLLM's tool-call parsers, and the tokens that each looks up."""

_NO_THINKING_TOKENS = """
    deepseek_v3 deepseek_v4 deepseek_v41 gemma4 glm45 glm47 granite granite_thinking_parser hf hunyuan_a13b inkling kimi_k2
    kimi_k3 ling3 mimo minicpmv minimax_m2 minimax_m2_append_think muse_glimmer nemotron_v3 openai_gptoss plamo3 qwen3
    seed_oss step3p5
"""
_THINK = ("<think>", "</think>")
REASONING_PARSERS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_NO_THINKING_TOKENS.split(), ()),
    **dict.fromkeys(("deepseek_r1", "ernie45", "holo2", "hy_v3", "hy_v4"), _THINK),
    "k2_horizon": ("<ifm|think>", "</ifm|think>"),
    "minimax_m3": ("<mm:think>", "</mm:think>"),
    "mistral": ("[TOOL_CALLS]",),
    "olmo3": ("</", "think", "Ġ</"),
    "poolside_v1": ("<assistant>",),
    "step3": ("</think>",),
}
"""vLLM's reasoning parsers, and the tokens that each looks up."""

UNSERVED = ("cohere_command3", "cohere_command4")
"""Parsers of both kinds that need a package which the server's environment lacks."""


@dataclass(frozen=True)
class ToolCalls:
    """What the server does with requests that offer tools.

    parser: vLLM's parser of the model's tool calls. None: such requests are refused.
    off: why they are refused, and the remedy.
    """

    parser: str | None
    off: str | None = None
    note: str | None = None
    """A remark about a choice that works."""


def resolve_tool_calls(
    asked: str | None, family: str, tokenizer: TokenizerFiles, server_args: Sequence[str] = ()
) -> ToolCalls:
    """The parser that was asked for, by the setting or in `server_args`, which win; else the
    family's, where the tokenizer serves it.

    Raises ConfigError for an explicit parser that vLLM does not have or whose tokens the tokenizer
    lacks.
    """
    inside = argument(server_args, "tool-call-parser")
    if inside is not None and argument(server_args, "tool-parser-plugin"):
        return ToolCalls(inside)  # the plugin may define it
    setting, name = ("server_args: --tool-call-parser", inside) if inside is not None else ("tool_call_parser", asked)
    if name is not None:
        _check(setting, name, TOOL_PARSERS, tokenizer, "leave it out: then requests with tools are refused")
        blind = f"the chat template in {tokenizer.folder} does not show the model the tools that a request offers"
        return ToolCalls(name, note=None if tokenizer.shows_tools else blind)
    why = _lacks(family, TOOL_PARSERS, tokenizer)
    if why is None and not tokenizer.shows_tools:
        why = "the model's chat template does not write tools into the prompt"
    if why is None:
        return ToolCalls(family)
    remedy = "set tool_call_parser (of the backend) to the vLLM parser that reads this model's calls, such as hermes"
    return ToolCalls(None, off=f"tools are off: {why}; {remedy}")


def check_reasoning(tokenizer: TokenizerFiles, server_args: Sequence[str]) -> str | None:
    """The reasoning parser in `server_args`. Raises ConfigError for one that vLLM lacks, or whose
    tokens the tokenizer lacks.
    """
    name = argument(server_args, "reasoning-parser")
    if name and not argument(server_args, "reasoning-parser-plugin"):
        _check("server_args: --reasoning-parser", name, REASONING_PARSERS, tokenizer, "leave it out")
    return name or None


def _check(
    setting: str, name: str, known: Mapping[str, tuple[str, ...]], tokenizer: TokenizerFiles, otherwise: str
) -> None:
    if name not in known and name not in UNSERVED:
        close = difflib.get_close_matches(name, known, n=2) or sorted(known)
        raise ConfigError(
            f"{setting} = {name!r} is no parser of vLLM's: choose {' or '.join(close[:2])}, or {otherwise}"
        )
    why = _lacks(name, known, tokenizer)
    if why is not None:
        raise ConfigError(f"{setting} = {name!r} can't work with this model: {why}; choose another, or {otherwise}")


def _lacks(name: str, known: Mapping[str, tuple[str, ...]], tokenizer: TokenizerFiles) -> str | None:
    """Why vLLM would die of this parser; None: it wouldn't."""
    if name in UNSERVED:
        return f"{name} needs the package cohere_melody, which the server's environment lacks"
    if name == "hf" and not tokenizer.response_template:
        return "hf needs a response_template in tokenizer_config.json"
    if tokenizer.tokens is None:
        return None
    missing = [token for token in known[name] if token not in tokenizer.tokens]
    return f"{name} needs {' and '.join(missing)} in the tokenizer's vocabulary" if missing else None
