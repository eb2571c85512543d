"""Which weights sampled which tokens of a choice.

vLLM tracks the weight version of every token and reports it on one of its own routes only. This keeps what it tracked
for the requests that `ChoiceFields` has announced, until the reply is written.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

Span = dict[str, str | int]

_PREFIXES = ("chatcmpl-", "cmpl-")
_collected: dict[str, dict[tuple[int, int], list[Span]]] = {}


def expect(request_id: str) -> None:
    """Announces a request; `request_id` is what its `X-Request-Id` header says, without dashes."""
    _collected[request_id] = {}


def record(engine_request_id: str, index: int, spans: list[Span]) -> None:
    """Keeps the spans of one finished sequence, if its request was announced. Never raises: an error here ends the server.

    engine_request_id: `chatcmpl-ID` or `cmpl-ID-PROMPT`, as vLLM builds it. A beam of a beam search has a name
    of its own; its tokens are no sample of the policy, and their versions stay unknown.
    """
    for prefix in _PREFIXES:
        if engine_request_id.startswith(prefix):
            request_id, _, prompt = engine_request_id.removeprefix(prefix).partition("-")
            if request_id in _collected and (not prompt or prompt.isdecimal()):
                _collected[request_id][int(prompt or 0), index] = spans


def take(request_id: str) -> list[list[Span]]:
    """Spans of every choice of a finished request, in the order of its choices."""
    found = _collected.pop(request_id)
    return [found[key] for key in sorted(found)]


def forget(request_id: str) -> None:
    """Drops what `take` did not fetch: a refused or interrupted request."""
    _collected.pop(request_id, None)


def apply() -> None:
    """Listens to vLLM's output processor. Called once, in the API process."""
    from vllm.v1.engine.output_processor import RequestState

    original = RequestState._new_completion_output

    def new_completion_output(self, *args: Any, **kwargs: Any):
        output = original(self, *args, **kwargs)
        if output.weight_versions is not None:
            owner = self.parent_req if self.parent_req is not None else self
            # An adapter's name is its version; the base weights' version is the engine's.
            spans: list[Span] = [
                {"version": self.lora_name or span.version, "start": span.start, "end": span.end}
                for span in output.weight_versions
            ]
            record(owner.external_req_id, self.request_index, _merged(spans))
        return output

    RequestState._new_completion_output = new_completion_output


def _merged(spans: list[Span]) -> list[Span]:
    """Neighbours of one version as one span: an adapter's tokens across a change of the base's version."""
    merged: list[Span] = []
    for span in spans:
        if merged and merged[-1]["version"] == span["version"]:
            merged[-1] = merged[-1] | {"end": span["end"]}
        else:
            merged.append(span)
    return merged
