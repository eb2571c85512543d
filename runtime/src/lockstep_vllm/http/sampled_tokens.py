"""The weights and the log-probability of each sampled token, which vLLM knows and does not put into
a reply.

vLLM tracks the weight version of every token and reports it on one of its own endpoints only. It
reports log-probabilities as OpenAI does, an object with text and bytes per token. At 128 tokens
making, sending and reading these objects costs more than the rest of a request. So a client that
does not ask for them gets them as one list of numbers.

This keeps what vLLM tracked for the requests that `ChoiceFields` has announced, until the reply is
written.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Span = dict[str, str | int]

_PREFIXES = ("chatcmpl-", "cmpl-")
_LEAST = -9999.0
"""vLLM reports this in place of less, minus infinity included: JSON has no infinity."""


@dataclass(frozen=True)
class Sampled:
    """One choice.

    spans: which version sampled which tokens.
    logprobs: one a token, nats; None where the client asked for OpenAI's.
    routed_experts: of a stream, as vLLM writes them into other replies; None where it records none.
    """

    spans: list[Span]
    logprobs: list[float] | None
    routed_experts: str | None = None


@dataclass
class _Announced:
    listed: bool
    """Its log-probabilities come as a list."""
    choices: dict[tuple[int, int], Sampled] = field(default_factory=dict)


_announced: dict[str, _Announced] = {}


class LogprobList(list[float]):
    """A choice's log-probabilities, in place of vLLM's containers. A stream takes slices of them."""

    def __getitem__(self, place: Any) -> Any:
        values = super().__getitem__(place)
        return LogprobList(values) if isinstance(place, slice) else values


def expect(request_id: str, *, listed: bool) -> None:
    """Announces a request; `request_id` is what its `X-Request-Id` header says, without dashes."""
    _announced[request_id] = _Announced(listed)


def record(engine_request_id: str, index: int, sampled: Sampled) -> None:
    """Keeps one finished sequence, if its request was announced. Never raises: an error here ends
    the server.

    engine_request_id: `chatcmpl-ID` or `cmpl-ID-PROMPT`, as vLLM builds it. A beam of a beam search
        has a name of its own. Its tokens are no sample of the policy, and their versions stay
        unknown.
    """
    request_id, prompt = _parts(engine_request_id)
    if request_id in _announced and (not prompt or prompt.isdecimal()):
        _announced[request_id].choices[int(prompt or 0), index] = sampled


def take(request_id: str) -> list[Sampled]:
    """Every choice of a finished request, in the order of its choices."""
    choices = _announced.pop(request_id).choices
    return [choices[key] for key in sorted(choices)]


def forget(request_id: str) -> None:
    """Drops what `take` did not fetch: a refused or interrupted request."""
    _announced.pop(request_id, None)


def wants_list(engine_request_id: str) -> bool:
    """True if the request's log-probabilities are kept as a list."""
    announced = _announced.get(_parts(engine_request_id)[0])
    return announced is not None and announced.listed


def apply() -> None:
    """Listens to vLLM's output processor. Called once, in the API process."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.v1.engine.logprobs import LogprobsProcessor

    _record_choices()
    _list_logprobs(LogprobsProcessor)
    _leave_lists_out(OpenAIServingChat, "_create_chat_logprobs")
    _leave_lists_out(OpenAIServingCompletion, "_create_completion_logprobs")


def _record_choices() -> None:
    from vllm.sampling_params import RequestOutputKind
    from vllm.utils.serial_utils import numpy2base64
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
            kept = self.logprobs_processor.logprobs  # of all tokens, where a stream's output has the newest
            logprobs = list(kept) if isinstance(kept, LogprobList) else None
            streamed = self.output_kind == RequestOutputKind.DELTA  # vLLM writes them into replies that are no stream
            experts = numpy2base64(output.routed_experts) if streamed and output.routed_experts is not None else None
            record(owner.external_req_id, self.request_index, Sampled(_merged(spans), logprobs, experts))
        return output

    RequestState._new_completion_output = new_completion_output


def _list_logprobs(processor_class: Any) -> None:
    """Keeps the sampled tokens' log-probabilities of announced requests as a `LogprobList`, without
    decoding a token's text.
    """
    original = processor_class.from_new_request.__func__

    class ListProcessor(processor_class):
        def _update_sample_logprobs(self, logprobs_lists: Any) -> None:
            for values in logprobs_lists.logprobs.tolist():
                logprob = max(values[0], _LEAST)  # the sampled token comes first
                self.cumulative_logprob += logprob
                self.logprobs.append(logprob)

    def from_new_request(cls: Any, tokenizer: Any, request: Any) -> Any:
        processor = original(cls, tokenizer, request)
        plain = processor.num_logprobs == 0 and processor.num_prompt_logprobs is None
        if plain and request.external_req_id is not None and wants_list(request.external_req_id):
            processor.__class__ = ListProcessor
            processor.logprobs = LogprobList()
        return processor

    processor_class.from_new_request = classmethod(from_new_request)


def _leave_lists_out(serving_class: Any, method: str) -> None:
    """Gives a reply null in place of OpenAI's log-probabilities where there is a list."""
    original = getattr(serving_class, method)

    def create(self, *args: Any, top_logprobs: Any, **kwargs: Any):
        if isinstance(top_logprobs, LogprobList):
            return None
        return original(self, *args, top_logprobs=top_logprobs, **kwargs)

    setattr(serving_class, method, create)


def _parts(engine_request_id: str) -> tuple[str, str]:
    """(The announced id, the number of a prompt or nothing); two empty texts for an id of another
    form.
    """
    for prefix in _PREFIXES:
        if engine_request_id.startswith(prefix):
            request_id, _, prompt = engine_request_id.removeprefix(prefix).partition("-")
            return request_id, prompt
    return "", ""


def _merged(spans: list[Span]) -> list[Span]:
    """Neighbours of one version as one span: an adapter's tokens across a change of the base's
    version.
    """
    merged: list[Span] = []
    for span in spans:
        if merged and merged[-1]["version"] == span["version"]:
            merged[-1] = merged[-1] | {"end": span["end"]}
        else:
            merged.append(span)
    return merged
