"""The ASGI middlewares by themselves: what a real server's tests don't reach."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise

import pytest

from lockstep.inference.environment.locate import Runtime
from lockstep.inference.launch import ServerConfig, _command
from lockstep_vllm.http import sampled_tokens
from lockstep_vllm.http.auth import BearerAuth
from lockstep_vllm.http.openai_fields import ChoiceFields, in_flight, sampling_of
from lockstep_vllm.http.short_prompts import TwoTokenPrompts
from lockstep_vllm.http.tools_off import ToolsOff
from lockstep_wire import whole_replies
from lockstep_wire.reply_digest import reply_digest
from lockstep_wire.sampling import SAMPLING_DEFAULTS


class Echo:
    """An app that keeps what it was asked and answers with a given reply."""

    def __init__(self, reply: bytes = b"{}", status: int = 200) -> None:
        self.reply = reply
        self.status = status
        self.calls = 0
        self.body = b""
        self.content_length = b""
        self.later: dict = {}
        self.spans: list[list[dict]] = []

    async def __call__(self, scope, receive, send) -> None:
        self.calls += 1
        if scope["type"] != "http":
            return
        message = await receive()
        self.body = message["body"]
        self.content_length = dict(scope["headers"]).get(b"content-length", b"")
        self.later = await receive()
        self.seen_in_flight = dict(in_flight)
        request_id = dict(scope["headers"]).get(b"x-request-id", b"").decode()
        for index, sequence_spans in enumerate(self.spans):
            listed = sampled_tokens.wants_list(f"chatcmpl-{request_id}")
            sampled = sampled_tokens.Sampled(sequence_spans, [-0.5] * len(sequence_spans) if listed else None)
            sampled_tokens.record(f"chatcmpl-{request_id}", index, sampled)
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"content-length", b"1")]})
        await send({"type": "http.response.body", "body": self.reply[:5], "more_body": True})
        await send({"type": "http.response.body", "body": self.reply[5:], "more_body": False})


async def call(app, scope_type="http", path="/v1/completions", headers=(), chunks=(b"{}",)):
    """Sends one request in chunks, then a disconnect; returns what the app sent back."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages[-1]["more_body"] = False
    messages.append({"type": "http.disconnect"})
    sent: list[dict] = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": scope_type, "method": "POST", "path": path, "headers": list(headers)}
    await app(scope, receive, send)
    return sent


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("LOCKSTEP_SERVER_TOKEN", "a-token-of-some-length")
    return b"Bearer a-token-of-some-length"


async def test_the_token_is_wanted_once_and_whole(token):
    app = Echo()
    auth = BearerAuth(app)
    name = b"authorization"
    refused = [[], [(name, b"")], [(name, token[:-1])], [(name, token + b"x")], [(name, token.lower())]]
    refused += [
        [(name, token), (name, b"Bearer other")],
        [(name, b"Basic " + token[7:])],
        [(name, "Bearer é".encode())],
    ]
    for headers in refused:
        sent = await call(auth, headers=headers)
        assert sent[0]["status"] == 401
        sent = await call(auth, scope_type="websocket", headers=headers)
        assert sent == [{"type": "websocket.close", "code": 1008, "reason": "missing or wrong bearer token"}]
    assert app.calls == 0
    assert (await call(auth, headers=[(name, token)]))[0]["status"] == 200
    await call(auth, scope_type="websocket", headers=[(name, token)])
    await call(auth, scope_type="lifespan")
    assert app.calls == 3


@pytest.mark.parametrize("value", [None, "", "short"])
def test_a_server_without_a_token_does_not_start(monkeypatch, value):
    monkeypatch.delenv("LOCKSTEP_SERVER_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("LOCKSTEP_SERVER_TOKEN", value)
    with pytest.raises(RuntimeError, match="LOCKSTEP_SERVER_TOKEN"):
        BearerAuth(Echo())


async def test_requests_and_replies_in_pieces():
    reply = {"model": "m@3", "prompt_token_ids": [1], "choices": [{"token_ids": [4, 5]}, {"token_ids": []}]}
    app = Echo(json.dumps(reply).encode())
    app.spans = [[{"version": "m@2", "start": 0, "end": 1}, {"version": "m@3", "start": 1, "end": 2}], []]
    sent = await call(
        ChoiceFields(app),
        path="/v1/chat/completions",
        headers=[(b"content-length", b"9")],
        chunks=(b'{"mod', b'el": "m@3"}'),
    )
    request = json.loads(app.body)
    assert request == {"model": "m@3", "logprobs": True, "return_token_ids": True, "temperature": 1.0}
    assert app.content_length == str(len(app.body)).encode()
    assert app.later == {"type": "http.disconnect"}
    assert app.seen_in_flight == {"m@3": 1}
    assert not in_flight
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    body = sent[1]["body"]
    assert dict(sent[0]["headers"])[b"content-length"] == str(len(body)).encode()
    choices = json.loads(body)["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [[1], [1]]
    assert [choice["weight_versions"] for choice in choices] == app.spans
    assert [choice["sampled_logprobs"] for choice in choices] == [[-0.5, -0.5], []]
    assert not sampled_tokens._announced


@pytest.mark.parametrize(
    ("asked", "listed", "sent"),
    [
        ({}, True, True),
        ({"logprobs": False}, True, True),
        ({"logprobs": True}, False, True),
        ({"top_logprobs": 3}, False, True),
        ({"prompt_logprobs": 1}, False, True),
    ],
)
async def test_openai_logprobs_come_where_the_client_asks(asked, listed, sent):
    """All others cost more than the rest of a request, and training reads the numbers alone."""
    app = Echo(json.dumps({"prompt_token_ids": [1], "choices": [{"token_ids": [4]}]}).encode())
    app.spans = [[{"version": "m@2", "start": 0, "end": 1}]]
    body = json.dumps({"model": "m@2", **asked}).encode()
    reply = await call(ChoiceFields(app), path="/v1/chat/completions", chunks=(body,))
    assert json.loads(app.body)["logprobs"] is sent
    assert ("sampled_logprobs" in json.loads(reply[1]["body"])["choices"][0]) is listed
    stream = json.dumps({"model": "m@2", "stream": True, **asked}).encode()
    await call(ChoiceFields(app), path="/v1/chat/completions", chunks=(stream,))
    assert not sampled_tokens._announced


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({}, {}),
        ({"parallel_tool_calls": False}, {}),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, {}),
        ({"tool_choice": "required"}, {"tool_choice": "required"}),
    ],
)
def test_b4_only_a_forced_tool_call_is_a_constraint(setting, says):
    """Strict tools and single calls set no grammar in our servers (`launch._environment`): agents that ask for them can be trained."""
    request = {"tools": [{"type": "function", "function": {"name": "f"}}]} | setting
    sampling = sampling_of(request)
    assert {name: value for name, value in sampling.items() if name not in SAMPLING_DEFAULTS} == says


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ({"logit_bias": {"5": 2.0}}, True),
        ({"structured_outputs": {"choice": ["a", "b"]}}, True),
        ({"response_format": {"type": "json_object"}}, True),
        ({"response_format": {"type": "text"}}, False),
        ({"tool_choice": "required"}, True),
        ({"tool_choice": "auto"}, False),
        ({"bad_words": []}, False),
        ({"allowed_token_ids": [4, 5]}, True),
        ({"min_tokens": 2}, True),
        ({"min_tokens": 0, "max_tokens": 4, "stop": ["x"]}, False),
    ],
)
async def test_what_constrains_the_sampling_travels_with_the_choice(setting, kept):
    app = Echo(json.dumps({"choices": [{"token_ids": [4]}]}).encode())
    app.spans = [[{"version": "m@2", "start": 0, "end": 1}]]
    sent = await call(ChoiceFields(app), chunks=(json.dumps({"model": "m@2", "top_p": 0.5, **setting}).encode(),))
    sampling = json.loads(sent[1]["body"])["choices"][0]["sampling"]
    assert sampling["top_p"] == 0.5
    assert sampling["temperature"] == 1.0
    extra = {name: value for name, value in sampling.items() if name not in SAMPLING_DEFAULTS}
    assert extra == (setting if kept else {})


async def test_errors_streams_and_other_paths_are_untouched():
    for status, path, body in (
        (400, "/v1/completions", b"{}"),
        (200, "/tokenize", b"{}"),
        (200, "/v1/completions", b"[]"),
    ):
        app = Echo(b"not json at all", status)
        sent = await call(ChoiceFields(app), path=path, chunks=(body,))
        assert b"".join(message.get("body", b"") for message in sent) == b"not json at all"
    sent = await call(ChoiceFields(Echo(b"null")))  # vLLM's reply to a client that has left
    assert b"".join(message.get("body", b"") for message in sent) == b"null"
    app = Echo(b"data: {}\n\n")
    sent = await call(ChoiceFields(app), chunks=(b'{"stream": true, "temperature": 0, "logprobs": 3}',))
    assert b"".join(message.get("body", b"") for message in sent) == b"data: {}\n\n"
    assert json.loads(app.body) == {"stream": True, "temperature": 0, "logprobs": 3, "return_token_ids": True}


class Streaming(Echo):
    """An app that answers with a stream, cut anywhere."""

    async def __call__(self, scope, receive, send) -> None:
        self.body = (await receive())["body"]
        request_id = dict(scope["headers"])[b"x-request-id"].decode()
        for index, sequence_spans in enumerate(self.spans):
            sampled = sampled_tokens.Sampled(sequence_spans, [-0.5, -0.25], "ZXhwZXJ0cw==")
            sampled_tokens.record(f"chatcmpl-{request_id}", index, sampled)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for start in range(0, len(self.reply), 37):
            body, more = self.reply[start : start + 37], start + 37 < len(self.reply)
            await send({"type": "http.response.body", "body": body, "more_body": more})


def _chunk(**fields) -> dict:
    return {"id": "c", "created": 1, "model": "m@2", "choices": [], **fields}


def _part(index=0, finish=None, ids=(), **delta) -> dict:
    return {"index": index, "delta": delta, "finish_reason": finish, "token_ids": list(ids)}


STREAM = [
    _chunk(choices=[_part(role="assistant", content="")], prompt_token_ids=[1, 2]),
    _chunk(choices=[_part(ids=[4], reasoning="hm", content="a\n\nü")]),
    _chunk(
        choices=[_part(ids=[], tool_calls=[{"index": 0, "id": "t", "function": {"name": "look", "arguments": ""}}])]
    ),
    _chunk(choices=[_part(tool_calls=[{"index": 0, "function": {"arguments": '{"a":'}}])]),
    _chunk(choices=[_part(finish="tool_calls", ids=[5], tool_calls=[{"index": 0, "function": {"arguments": "1}"}}])]),
    _chunk(usage={"prompt_tokens": 2, "completion_tokens": 2}),
]


def _events(chunks) -> bytes:
    return b"".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode() for chunk in chunks)


async def streamed(chunks, ended=True, pace_s=0) -> tuple[bytes, Streaming]:
    app = Streaming(_events(chunks) + b"data: [DONE]\n\n" * ended)
    app.spans = [[{"version": "m@2", "start": 0, "end": 2}]]
    body = json.dumps({"model": "m@2", "stream": True, whole_replies.FIELD: pace_s}).encode()
    sent = await call(ChoiceFields(app), path="/v1/chat/completions", chunks=(body,))
    assert not sampled_tokens._announced
    return b"".join(message.get("body", b"") for message in sent), app


async def test_a_stream_ends_with_its_whole_reply_where_that_is_asked_for():
    sent, app = await streamed(STREAM)
    assert json.loads(app.body)["stream_options"] == {"include_usage": True}
    assert whole_replies.FIELD not in json.loads(app.body)
    assert sent.startswith(_events(STREAM))
    assert sent.endswith(b"\n\ndata: [DONE]\n\n")
    reply = json.loads(sent[len(_events(STREAM)) :].split(b"\n\n")[0].removeprefix(b"data: "))[whole_replies.EVENT]
    (choice,) = reply["choices"]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([4, 5], [1, 2])
    assert (choice["sampled_logprobs"], choice["finish_reason"]) == ([-0.5, -0.25], "tool_calls")
    assert choice["weight_versions"] == [{"version": "m@2", "start": 0, "end": 2}]
    assert choice["message"]["reasoning"] == "hm"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"a":1}'}
    assert choice["reply_digest"] == reply_digest([4, 5], choice["message"])
    assert choice["routed_experts"] == "ZXhwZXJ0cw=="
    assert choice["routed_experts_digest"]


async def test_a_stream_that_breaks_off_has_no_whole_reply():
    for chunks in (STREAM[:3], [{"error": {"message": "lost"}}]):
        sent, _ = await streamed(chunks)
        assert sent == _events(chunks) + b"data: [DONE]\n\n"
    sent, _ = await streamed(STREAM, ended=False)
    assert whole_replies.EVENT.encode() not in sent


async def test_what_comes_between_two_events_is_joined_without_losing_its_order():
    """Two choices, one letter a chunk: thinking, text, thinking again, and two calls."""
    letters = [
        {"reasoning": "h"},
        {"reasoning": "m"},
        {"content": "ä"},
        {"content": ""},
        {"content": "b"},
        {"reasoning": "!"},
    ]
    opened = [{"tool_calls": [{"index": n, "id": f"c{n}", "function": {"name": "f", "arguments": ""}}]} for n in (0, 1)]
    calls = [{"tool_calls": [{"index": n, "function": {"arguments": letter}}]} for n in (0, 1) for letter in "{}"]
    deltas = [*letters, opened[0], *calls[:2], opened[1], *calls[2:]]
    parts = [_part(index, ids=[1], **delta) for delta in deltas for index in (0, 1)]
    parts += [_part(index, finish="stop", ids=[2]) for index in (0, 1)]
    chunks = [_chunk(choices=[_part(n, role="assistant", content="")], prompt_token_ids=[1]) for n in (0, 1)]
    chunks += [_chunk(choices=[part]) for part in parts]
    chunks.append(_chunk(usage={"prompt_tokens": 1, "completion_tokens": 9}))
    sent, _ = await streamed(chunks, pace_s=60)
    events = [json.loads(event[6:]) for event in sent.split(b"\n\n") if event.startswith(b"data: {")]
    joined, each = whole_replies.StreamedReply(), whole_replies.StreamedReply()
    for chunk in events[:-1]:
        joined.add(chunk)
    for chunk in chunks:
        each.add(chunk)
    messages = [[choice["message"] for choice in reply.completed()["choices"]] for reply in (joined, each)]
    assert messages[0] == messages[1]
    assert [choice["message"] for choice in events[-1][whole_replies.EVENT]["choices"]] == messages[0]
    shown = [part["delta"] for event in events[:-1] for part in event["choices"] if part["index"] == 1]
    assert [
        next(name for name in ("tool_calls", "reasoning", "content") if delta.get(name) or name == "content")
        for delta in shown
    ] == [*("content", "reasoning", "content", "reasoning", "tool_calls", "tool_calls")]
    assert [choice["token_ids"] for choice in events[-1][whole_replies.EVENT]["choices"]] == [
        [1] * len(deltas) + [2]
    ] * 2


class Counting(Echo):
    """Echo with a `/tokenize` that takes words for tokens, and knows the model `m` only.

    Like vLLM's it listens for a client that leaves while it works, and then answers nothing.
    """

    async def __call__(self, scope, receive, send) -> None:
        if scope["path"] != "/tokenize":
            await super().__call__(scope, receive, send)
            return
        asked = json.loads((await receive())["body"])
        leaving = asyncio.ensure_future(receive())
        await asyncio.wait([leaving], timeout=0.01)
        if not leaving.cancel():
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"null"})
            return
        known = asked["model"] == "m" and asked["add_special_tokens"] is True
        await send({"type": "http.response.start", "status": 200 if known else 404, "headers": []})
        body = json.dumps({"count": len(asked["prompt"].split()), "tokens": []}).encode()
        await send({"type": "http.response.body", "body": body[:4], "more_body": True})
        await send({"type": "http.response.body", "body": body[4:], "more_body": False})


@pytest.mark.parametrize(
    ("request_", "refused"),
    [
        ({"prompt": [5]}, True),
        ({"prompt": [5, 6]}, False),
        ({"prompt": [[5, 6], [7]]}, True),
        ({"prompt": [[5, 6], [7, 8]]}, False),
        ({"prompt": "one"}, True),
        ({"prompt": "one two"}, False),
        ({"prompt": ["one two", "one"]}, True),
        ({"prompt": "one", "model": "unknown"}, False),
        ({"prompt": [5, 6], "truncate_prompt_tokens": 1}, True),
        ({"prompt": None}, False),
        ({}, False),
    ],
)
async def test_prompts_of_one_token_are_refused_where_they_kill(request_, refused):
    app = Counting(b"an answer")
    body = json.dumps({"model": "m"} | request_).encode()
    sent = await call(TwoTokenPrompts(app), chunks=(body[:3], body[3:]))
    assert sent[0]["status"] == (400 if refused else 200)
    answer = b"".join(message.get("body", b"") for message in sent)
    if refused:
        assert "one token" in json.loads(answer)["error"]["message"]
        assert app.calls == 0
    else:
        assert (app.body, answer) == (body, b"an answer")


async def test_only_completions_are_looked_at():
    for path, kind in (("/v1/chat/completions", "http"), ("/tokenize2", "http"), ("/v1/completions", "lifespan")):
        app = Echo(b"an answer")
        await call(TwoTokenPrompts(app), scope_type=kind, path=path, chunks=(b'{"prompt": [5]}',))
        assert app.calls == 1


@pytest.mark.parametrize(
    ("kind", "architecture", "placed"),
    [
        ("cpu", "Qwen3_5ForCausalLM", True),
        ("cpu", "Qwen3_5MoeForConditionalGeneration", True),
        ("cpu", "Qwen3ForCausalLM", False),
        ("cuda", "Qwen3_5ForCausalLM", False),
    ],
)
def test_only_servers_that_would_die_look_for_short_prompts(kind, architecture, placed, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    config = ServerConfig(model=tmp_path, served_name="base")
    command = _command(config, Runtime(kind, tmp_path / "python", tmp_path, None), 1)
    names = [value for flag, value in pairwise(command) if flag == "--middleware"]
    assert ("lockstep_vllm.http.short_prompts.TwoTokenPrompts" in names) is placed
    assert names[-1] == "lockstep_vllm.http.auth.BearerAuth"  # the outermost


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("path", "request_", "refused"),
    [
        ("/v1/chat/completions", {"messages": [], "tools": [TOOL]}, True),
        ("/v1/chat/completions", {"messages": [], "tools": [TOOL], "tool_choice": "required"}, True),
        ("/v1/responses", {"input": "", "tools": [TOOL]}, True),
        ("/v1/chat/completions", {"messages": [], "tools": [TOOL], "tool_choice": "none"}, False),
        ("/v1/chat/completions", {"messages": []}, False),
        ("/v1/chat/completions", {"messages": [], "tools": []}, False),
        ("/v1/models", {"tools": [TOOL]}, False),
    ],
)
async def test_requests_with_tools_are_refused_with_the_reason(monkeypatch, path, request_, refused):
    monkeypatch.setenv("LOCKSTEP_TOOLS_OFF", "tools are off: set tool_call_parser")
    app = Echo()
    sent = await call(ToolsOff(app), path=path, chunks=(json.dumps(request_).encode(),))
    assert app.calls == (not refused)
    if refused:
        assert sent[0]["status"] == 400
        assert json.loads(sent[1]["body"])["error"]["message"] == "tools are off: set tool_call_parser"
    else:
        assert json.loads(app.body) == request_


def test_only_servers_without_a_parser_say_that_tools_are_off(tmp_path, tiny_qwen3):
    runtime = Runtime("cpu", tmp_path / "python", tmp_path, None)
    for off in (None, "why"):
        config = ServerConfig(model=tiny_qwen3, served_name="m", tools_off=off)
        assert ("lockstep_vllm.http.tools_off.ToolsOff" in _command(config, runtime, 1)) == (off is not None)
