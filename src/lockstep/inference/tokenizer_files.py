"""The contents of a checkpoint's tokenizer files, read without transformers: the vocabulary and the
chat template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.errors import ConfigError
from lockstep.inference.vllm_options import unknown_option

_ARGUMENT = "--"


def argument(server_args: Sequence[str], name: str) -> str | None:
    """The value that vLLM's argument `--NAME` has in `server_args`, in any of its spellings; None:
    it is not there. The last one wins.
    """
    value = None
    for position, text in enumerate(server_args):
        flag, equals, rest = text.partition("=")
        if not flag.startswith(_ARGUMENT) or flag.removeprefix(_ARGUMENT).replace("_", "-") != name:
            continue
        value = rest if equals else next(iter(server_args[position + 1 : position + 2]), "")
    return value


OURS = {
    "host": "the server listens on loopback",
    "port": "the port is chosen at the start",
    "api-key": "every server has a token of its own",
    "served-model-name": "versions are served under names that the run gives",
    "generation-config": "log-probabilities must be those of what was sampled",
    "override-generation-config": "log-probabilities must be those of what was sampled; give sampling settings in the request",
    "logprobs-mode": "log-probabilities must be those of what was sampled",
    "tool-strict-level": "a grammar on tool calls changes what is sampled",
    **dict.fromkeys(
        ("speculative-config", "spec-method", "spec-model", "spec-tokens"),
        "a draft model's acceptance may change what is sampled",
    ),
    "config": "a file's settings would win unseen; write them out",
    "uds": "the server listens on loopback",
    "grpc": "the token guards HTTP only",
    "grpc-port": "the token guards HTTP only",
    "seed": "set seed of the backend",
}
"""Arguments of vLLM that a run decides itself, and why: changed behind its back, training would be
silently wrong.
"""


def check_server_args(server_args: Sequence[str]) -> None:
    """Raise ConfigError for an argument that the run decides itself, or that vLLM does not have."""
    for name, why in OURS.items():
        if argument(server_args, name) is not None:
            raise ConfigError(f"server_args can't have --{name}: {why}")
    if (problem := unknown_option(server_args)) is not None:
        raise ConfigError(problem)


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer that a server uses.

    tokens: id of each token; None where the files don't list them (a sentencepiece model alone).
    template: the chat template that a request without tools gets.
    tool_template: the one with tools. None: there is none.
    response_template: the tokenizer's configuration describes the form of its replies.
    """

    folder: Path
    tokens: Mapping[str, int] | None
    template: str | None
    tool_template: str | None
    response_template: bool = False

    @property
    def shows_tools(self) -> bool:
        """True if the chat template writes a request's tools into the prompt."""
        return self.tool_template is not None and re.search(r"\btools\b", self.tool_template) is not None


def read_tokenizer(model: Path, server_args: Sequence[str] = ()) -> TokenizerFiles:
    """The tokenizer files of a checkpoint folder. `--tokenizer` and `--chat-template` in
    `server_args` win, as they do in the server.

    Raises ConfigError for a file that can't be read.
    """
    other = argument(server_args, "tokenizer")
    folder = Path(other).expanduser() if other and Path(other).expanduser().is_dir() else model
    config = _json(folder / "tokenizer_config.json") or {}
    plain, with_tools = _templates(folder, config)
    given = argument(server_args, "chat-template")
    if given:
        file = Path(given).expanduser()
        plain = with_tools = file.read_text(encoding="utf-8") if file.is_file() else given
    return TokenizerFiles(folder, _tokens(folder, config), plain, with_tools, "response_template" in config)


def _json(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}); download the checkpoint again") from None


def _tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, int] | None:
    fast = _json(folder / "tokenizer.json")
    if fast is not None:
        listed = (fast.get("model") or {}).get("vocab") or {}
        tokens = dict(listed) if isinstance(listed, dict) else {entry[0]: number for number, entry in enumerate(listed)}
        tokens |= {token["content"]: token["id"] for token in fast.get("added_tokens") or ()}
    else:
        tokens = _json(folder / "vocab.json")
        if tokens is None:
            return None
        tokens = dict(tokens) | (_json(folder / "added_tokens.json") or {})
    added = config.get("added_tokens_decoder") or {}
    return tokens | {token["content"]: int(number) for number, token in added.items()}


def _templates(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """(without tools, with tools), as transformers chooses them: the file of its own, then the
    configuration's text or named texts.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        text = file.read_text(encoding="utf-8")
        named = folder / "additional_chat_templates" / "tool_use.jinja"
        return text, named.read_text(encoding="utf-8") if named.is_file() else text
    listed = config.get("chat_template") or (_json(folder / "chat_template.json") or {}).get("chat_template")
    if isinstance(listed, str) or listed is None:
        return listed, listed
    named = {entry["name"]: entry["template"] for entry in listed}
    plain = named.get("default")
    return plain, named.get("tool_use", plain)
