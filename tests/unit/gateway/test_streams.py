"""What a client of each API reads from a stream: thinking, text and calls, as from a reply that is none."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import importlib

import anthropic
import openai
import pytest

from lockstep.gateway.app import CHAT, MESSAGES, RESPONSES
from lockstep_wire.whole_replies import StreamedReply

CALLS = [("look", '{"a": [1, "ü"]}'), ("find", "{}")]
QUESTION = {"role": "user", "content": "Go."}


def chunks(reasoning: str, text: str, calls: list[tuple[str, str]]) -> list[dict]:
    """A reply as vLLM streams it, letter by letter."""
    deltas = [{"role": "assistant", "content": ""}]
    deltas += [{"reasoning": letter} for letter in reasoning] + [{"content": letter} for letter in text]
    for index, (name, arguments) in enumerate(calls):
        deltas.append(
            {"tool_calls": [{"index": index, "id": f"call-{index}", "function": {"name": name, "arguments": ""}}]}
        )
        deltas += [{"tool_calls": [{"index": index, "function": {"arguments": letter}}]} for letter in arguments]
    head = {"id": "chatcmpl-1", "created": 1, "model": "m@0"}
    parts = [{**head, "choices": [{"index": 0, "delta": delta, "token_ids": [k]}]} for k, delta in enumerate(deltas)]
    parts[0]["prompt_token_ids"] = [1, 2, 3]
    end = {"index": 0, "delta": {}, "finish_reason": "tool_calls" if calls else "stop", "token_ids": [9]}
    usage = {"prompt_tokens": 3, "completion_tokens": len(deltas) + 1, "total_tokens": len(deltas) + 4}
    return [*parts, {**head, "choices": [end]}, {**head, "choices": [], "usage": usage}]


def replied(dialect, parts: list[dict]) -> tuple[bytes, dict]:
    """The same reply as a stream and whole."""
    added, stream = StreamedReply(), dialect.stream("claude", {})
    for part in parts:
        added.add(part)
    plain = dialect.reply(added.completed(), "claude")
    return b"".join(map(stream.chunk, parts)) + stream.end(plain), plain


def client_of(package, body: bytes):
    """The package's client, whose one request gets this stream."""
    http = importlib.import_module(package.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])
    sent = http.Response(200, headers={"content-type": "text/event-stream"}, content=body)
    transport = http.MockTransport(lambda request: sent)
    kind = package.AsyncAnthropic if package is anthropic else package.AsyncOpenAI
    return kind(
        base_url="http://gateway/v1", api_key="k", http_client=package.DefaultAsyncHttpxClient(transport=transport)
    )


CASES = pytest.mark.parametrize(
    ("reasoning", "text", "calls"),
    [("", "yes", []), ("hm, ", "yes\n\nno", CALLS), ("hm", "", CALLS[:1]), ("", "", CALLS), ("", "", [])],
)


@CASES
async def test_chat_chunks_add_up(reasoning, text, calls):
    body, plain = replied(CHAT, chunks(reasoning, text, calls))
    read = StreamedReply()
    async for chunk in await client_of(openai, body).chat.completions.create(
        model="m", messages=[QUESTION], stream=True
    ):
        assert chunk.model == "claude"
        read.add(chunk.model_dump())
    (choice,) = (read.completed() or read_without_usage(read))["choices"]
    (expected,) = plain["choices"]
    assert (choice["message"]["content"] or "") == text
    assert (choice["message"]["reasoning"] or "") == reasoning
    assert choice["finish_reason"] == expected["finish_reason"]
    assert choice["token_ids"] == []
    called = [(call["function"]["name"], call["function"]["arguments"]) for call in choice["message"]["tool_calls"]]
    assert called == calls


def read_without_usage(read: StreamedReply) -> dict:
    """A client that asks for no usage gets none."""
    read.add({"usage": {"completion_tokens": 0}})
    return read.completed()


@CASES
async def test_anthropics_events_make_the_message(reasoning, text, calls):
    body, plain = replied(MESSAGES, chunks(reasoning, text, calls))
    async with client_of(anthropic, body).messages.stream(model="m", max_tokens=9, messages=[QUESTION]) as events:
        message = await events.get_final_message()
    read = message.model_dump(exclude_none=True)
    assert [strip(block) for block in read["content"]] == [strip(block) for block in plain["content"]]
    assert [block["type"] for block in read["content"]] == ["thinking"] * bool(reasoning) + ["text"] * bool(text) + [
        "tool_use"
    ] * len(calls)
    assert read["stop_reason"] == plain["stop_reason"]
    assert read["usage"]["input_tokens"] == 3
    assert read["usage"]["output_tokens"] == plain["usage"]["output_tokens"]


def strip(block: dict) -> dict:
    return {
        name: value for name, value in block.items() if value is not None and name not in ("citations", "parsed_output")
    }


@CASES
async def test_openais_events_make_the_response(reasoning, text, calls):
    body, plain = replied(RESPONSES, chunks(reasoning, text, calls))
    async with client_of(openai, body).responses.stream(model="m", input="Go.") as events:
        seen = [event async for event in events]
        response = await events.get_final_response()
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert [item.type for item in response.output] == [item["type"] for item in plain["output"]]
    assert response.output_text == text
    called = [(item.name, item.arguments) for item in response.output if item.type == "function_call"]
    assert called == calls
    deltas = [event for event in seen if event.type == "response.output_text.delta"]
    assert len(deltas) == len(text)
    done = [event.item.id for event in seen if event.type == "response.output_item.done"]
    assert done == [item.id for item in response.output]


async def test_text_before_thinking_keeps_the_order_of_the_stream():
    parts = chunks("", "yes", [])
    late = {**parts[1], "choices": [{"index": 0, "delta": {"reasoning": "hm"}}]}
    body, _ = replied(RESPONSES, [*parts[:2], late, *parts[2:]])
    async with client_of(openai, body).responses.stream(model="m", input="Go.") as events:
        response = await events.get_final_response()
    assert [item.type for item in response.output] == ["message", "reasoning"]
    assert response.output_text == "yes"
