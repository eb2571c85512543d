"""What the server does with an episode's request before it samples, and what a model may sample, without a server."""

from __future__ import annotations

import copy
import json
from importlib import metadata
from typing import Any

from chat_templates import TEMPLATES
from lockstep_wire import history

REAL_TEMPLATES = (
    "qwen3",
    "qwen3_instruct_2507",
    "qwen3_5_think",
    "qwen3_5_nothink",
    "qwen3_6",
    "qwen3_8",
    "llama3",
    "llama3_1",
    "llama3_2",
)
"""Chat templates of the families' own checkpoints, as the package `trl` brings them."""
WITHOUT_PARALLEL_CALLS = ("llama3_1", "llama3_2")
"""Templates that raise an error for a reply with two calls."""
ROLE_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>", "<think>", "</think>")


def template_of(name: str) -> str | None:
    """A template by name; None for "tiny", whose tokenizer has one of its own."""
    if name not in REAL_TEMPLATES:
        return TEMPLATES.get(name)
    try:
        files = metadata.distribution("trl")
    except metadata.PackageNotFoundError:
        raise RuntimeError("the chat templates of real families come with the package trl: make setup-dev") from None
    with open(str(files.locate_file(f"trl/chat_templates/{name}.jinja")), encoding="utf-8") as file:
        return file.read()


def with_role_tokens(tokenizer: Any) -> Any:
    """The tokenizer, also with the tokens of the real families that stand around messages and thinking."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(ROLE_TOKENS)})
    tokenizer.bos_token = "<|begin_of_text|>"
    return tokenizer


class Renderer:
    """A tokenizer with one template, and what the server does with a request."""

    def __init__(self, tokenizer: Any, name: str, template: str | None = None):
        self.tokenizer, self.name, self.template = tokenizer, name, template or template_of(name)
        self._generation_prompts: dict[str, list[int]] = {}
        self.turn_end = "<|eot_id|>" if name.startswith("llama") else "<|im_end|>"

    def render(self, messages: list[dict[str, Any]], tools: Any, prompt: bool = True) -> list[int]:
        """The ids of a conversation, whose messages vLLM changes in three ways before a template sees them."""
        return self.tokenizer.apply_chat_template(
            [_as_vllm_gives(message) for message in messages],
            chat_template=self.template,
            tools=tools,
            add_generation_prompt=prompt,
            return_dict=False,
        )

    def prompt(self, place: Any, tools: Any) -> list[int]:
        """The ids to sample from. Raises MisalignedError where the template and the history disagree."""
        full, known = self.render(place.conversation(), tools), place.history()
        if known is None:
            return full
        known = history.decode(known.encode())
        short = self.render(history.short_conversation(place.conversation()[known.messages :]), tools)
        marker = self.tokenizer.encode(history.MARKER, add_special_tokens=False)
        return history.continued(known, full, history.after_marker(short, marker), self._opened(tools))

    def _opened(self, tools: Any) -> list[int]:
        offered, asking = json.dumps(tools), [history.STANDS_FOR_ASKING]
        if offered not in self._generation_prompts:
            with_prompt, without = self.render(asking, tools), self.render(asking, tools, prompt=False)
            self._generation_prompts[offered] = history.generation_prompt(with_prompt, without)
        return self._generation_prompts[offered]


def _as_vllm_gives(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments as an object, thinking under both of its names, and no list of calls that is empty."""
    message = copy.deepcopy(message)
    for call in message.get("tool_calls") or []:
        given = call["function"].get("arguments")
        try:
            parsed = json.loads(given) if isinstance(given, str) else given
        except ValueError:
            parsed = None
        call["function"]["arguments"] = parsed if isinstance(parsed, dict) else {}
    if message.get("reasoning") is not None:
        message["reasoning_content"] = message["reasoning"]
    return message


def sampled(
    renderer: Renderer, thought: str, text: str, calls: int, *, ends: bool, parsed: bool = False
) -> tuple[dict[str, Any], list[int]]:
    """A reply as a server gives it, and its ids: other whitespace than any template writes.

    ends: the model ended its turn; else a limit did. parsed: the server's reasoning parser took the thinking out of the text.
    """
    arguments = '{"b" :1,  "a": [2, "ü"]}'
    raw = f"<think>\n {thought}\n</think>\n" if thought else ""
    raw += text + "".join(f' <tool_call>{{"name":"look","arguments":{arguments}}}</tool_call>' for _ in range(calls))
    ids = renderer.tokenizer.encode(raw, add_special_tokens=False)
    ids += renderer.tokenizer.encode(renderer.turn_end, add_special_tokens=False) if ends else []
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": arguments}}
    message: dict[str, Any] = {"role": "assistant", "tool_calls": [call] * calls or None, "refusal": None}
    if parsed:
        return message | {"content": text, "reasoning": f"\n {thought}\n" if thought else None}, ids
    return message | {"content": f"<think>\n {thought}\n</think>\n{text}" if thought else text}, ids


def drifted(message: dict[str, Any], drift: set[str]) -> dict[str, Any]:
    """The reply as a harness may give it back."""
    message = copy.deepcopy(message)
    if "null" in drift:
        message |= {"audio": None, "annotations": []}
    if "thinking" in drift:
        message["content"] = message["content"].split("</think>\n")[-1]
        message.pop("reasoning", None)
    if "renamed" in drift and message.get("reasoning"):
        message["reasoning_content"] = message.pop("reasoning").strip()
    if "space" in drift:
        message["content"] = f"\n{message['content'].strip()}  "
    if "parts" in drift:
        message["content"] = [{"type": "text", "text": message["content"]}]
    if "keys" in drift and message["tool_calls"]:
        for call in message["tool_calls"]:
            call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]), sort_keys=True)
    return message


DRIFTS = ("null", "thinking", "renamed", "space", "parts", "keys")
"""What harnesses do to replies without changing what was said."""
