"""What the engine holds back reaches the API process whole, in order, and with its version."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep_vllm.patches.held_outputs import PART, HeldOutputs, StepLogprobs


class Logprobs(NamedTuple):
    """As vLLM's `LogprobsLists`."""

    logprob_token_ids: np.ndarray
    logprobs: np.ndarray
    sampled_token_ranks: np.ndarray
    cu_num_generated_tokens: list[int] | None = None


@dataclass
class Output:
    """As vLLM's `EngineCoreOutput`, the fields that matter here."""

    request_id: str
    new_token_ids: list[int]
    new_logprobs: Any = None
    finish_reason: str | None = None
    events: list[Any] | None = None
    routed_experts: Any = None
    new_prompt_logprobs_tensors: Any = None
    new_sampling_mask: Any = None


@dataclass
class Request:
    is_whole: bool = True


def logprobs(token: int, columns: int) -> Any:
    """A step of three requests, of which this one is the second."""
    values = np.array([-1, token, -2], np.float32) / 7
    rows = np.array([-1, token, -2], np.int32)
    every = np.zeros(columns, np.float32)
    lists = Logprobs(rows[:, None] + every.astype(np.int32), values[:, None] + every, rows)
    return StepLogprobs(lists).slice_request(1, 1)


@dataclass
class Run:
    """Steps of an engine, and what its client has received."""

    outputs: HeldOutputs = field(default_factory=lambda: HeldOutputs(lambda request: request.is_whole))
    requests: dict[str, Request] = field(default_factory=dict)
    messages: list[Output] = field(default_factory=list)

    def step(self, outputs: list[Output]) -> None:
        for output in outputs:
            if output.finish_reason is not None:
                self.requests.pop(output.request_id)
        self.messages += self.outputs.pass_on(0, outputs, self.requests)

    def tokens(self, name: str) -> list[int]:
        return [token for each in self.messages if each.request_id == name for token in each.new_token_ids]


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 3 * PART), min_size=1, max_size=4),
    columns=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    swap=st.integers(1, 3 * PART),
)
def test_every_token_arrives_once_in_order_with_its_logprob(lengths, columns, swap):
    run = Run(requests={str(name): Request() for name in range(len(lengths))})
    for step in range(max(lengths)):
        if step == swap:
            taken = run.outputs.take_all()
            run.messages += taken.get(0, [])
            assert set(taken) <= {0}
            assert run.outputs.take_all() == {}
            for name in range(len(lengths)):  # all that the old weights sampled has been sent under their version
                assert run.tokens(str(name)) == list(range(min(step, lengths[name])))
        run.step(
            [
                Output(str(name), [step], logprobs(step, columns[step % len(columns)]), "stop" if last else None)
                for name, length in enumerate(lengths)
                if step < length
                for last in [step == length - 1]
            ]
        )
    for name, length in enumerate(lengths):
        parts = [each for each in run.messages if each.request_id == str(name)]
        assert run.tokens(str(name)) == list(range(length))
        assert [each.finish_reason for each in parts] == [None] * (len(parts) - 1) + ["stop"]
        assert len(parts) <= 2 + length // PART + 1
        for each in parts:
            assert each.new_logprobs is not None
            tokens = np.array(each.new_token_ids)
            np.testing.assert_array_equal(each.new_logprobs.logprobs[:, 0], tokens.astype(np.float32) / np.float32(7))
            np.testing.assert_array_equal(each.new_logprobs.logprob_token_ids[:, 0], tokens)
            np.testing.assert_array_equal(each.new_logprobs.sampled_token_ranks, tokens)
            assert each.new_logprobs.logprobs.dtype == np.float32


def test_a_stream_gets_each_token_at_once():
    run = Run(requests={"stream": Request(is_whole=False)})
    for token in range(5):
        run.step([Output("stream", [token])])
    assert [each.new_token_ids for each in run.messages] == [[0], [1], [2], [3], [4]]


def test_what_more_than_tokens_is_sent_at_once_with_all_before():
    run = Run(requests={"a": Request()})
    for token in range(4):
        run.step([Output("a", [token])])
    run.step([Output("a", [4], events=["preempted"])])
    assert [each.new_token_ids for each in run.messages] == [[0], [1, 2, 3, 4]]
    assert run.messages[-1].events == ["preempted"]


def test_an_end_without_tokens_brings_the_tokens_before():
    run = Run(requests={"a": Request()})
    for token in range(3):
        run.step([Output("a", [token], logprobs(token, 1))])
    run.step([Output("a", [], None, "error")])
    last = run.messages[-1]
    assert last.new_token_ids == [1, 2]
    assert last.new_logprobs is not None
    assert last.new_logprobs.sampled_token_ranks.tolist() == [1, 2]


def test_requests_that_were_aborted_are_forgotten():
    run = Run()
    for name in map(str, range(3 * PART)):
        run.requests[name] = Request()
        run.step([Output(name, [1])])
        del run.requests[name]
    run.requests["alive"] = Request()
    run.step([Output("alive", [1])])
    run.step([Output("alive", [2])])
    assert len(run.outputs._held) <= PART + 2
    assert run.outputs.take_all()[0][0].new_token_ids == [2]
