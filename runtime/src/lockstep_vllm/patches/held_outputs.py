"""The engine sends the tokens of a reply in parts of many, where vLLM sends each by itself.

A token by itself costs the engine a message with three arrays, and the API process as much again:
of 512 short replies at once, more than the model costs. A client that takes its reply as a whole
needs no token before the end. The first token still goes at once, for vLLM's time to first token.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

PART = 32
"""Outputs of a request that are sent together. With more, the API process would be idle until the
end, and then busy with every reply at once.
"""


class StepLogprobs:
    """The log-probabilities of one step. vLLM's `LogprobsLists` cuts three arrays for each request."""

    def __init__(self, lists: Any) -> None:
        self.lists = lists

    def slice_request(self, index: int, count: int) -> tuple[StepLogprobs, int, int]:
        """The rows of one request, which `cut` makes arrays of."""
        offsets = self.lists.cu_num_generated_tokens
        start = index if offsets is None else offsets[index]
        return self, start, start + count

    @cached_property
    def rows(self) -> tuple[list[list[int]], list[list[float]], list[int]]:
        """Token ids, log-probabilities and ranks. Of single rows, lists are faster than arrays."""
        lists = self.lists
        return lists.logprob_token_ids.tolist(), lists.logprobs.tolist(), lists.sampled_token_ranks.tolist()


def cut(parts: list[tuple[StepLogprobs, int, int]]) -> Any:
    """One request's rows of several steps, as vLLM's `LogprobsLists`."""
    lists = parts[0][0].lists
    if len(parts) == 1:
        rows = slice(*parts[0][1:])
        tables = lists.logprob_token_ids[rows], lists.logprobs[rows], lists.sampled_token_ranks[rows]
        return type(lists)(*tables)
    ids, logprobs, ranks = [], [], []
    for step, start, end in parts:
        step_ids, step_logprobs, step_ranks = step.rows
        ids += step_ids[start:end]
        logprobs += step_logprobs[start:end]
        ranks += step_ranks[start:end]
    # A step has as many columns as its most demanding request asked for, so at least this request's.
    columns = [step.lists.logprobs.shape[1] for step, _, _ in parts]
    if min(columns) < max(columns):
        ids, logprobs = [row[: min(columns)] for row in ids], [row[: min(columns)] for row in logprobs]
    return type(lists)(
        np.array(ids, lists.logprob_token_ids.dtype),
        np.array(logprobs, lists.logprobs.dtype),
        np.array(ranks, lists.sampled_token_ranks.dtype),
    )


class HeldOutputs:
    """Outputs that the engine has and has not sent, by request, in the order of their tokens.

    is_whole: True of a vLLM Request whose reply nobody reads before the end.
    """

    def __init__(self, is_whole: Callable[[Any], bool]) -> None:
        self._is_whole = is_whole
        self._held: dict[str, list[Any]] = {}
        self._clients: dict[str, int] = {}

    def pass_on(self, client: int, outputs: list[Any], requests: dict[str, Any]) -> list[Any]:
        """What is sent of one step's outputs to one client.

        client: the number of the API process.
        requests: vLLM's Request by name, of all that are not finished.
        """
        sent = []
        for output in outputs:
            name = output.request_id
            waiting = self._held.get(name)
            if waiting is None:
                sent.append(joined([output]))
                if output.finish_reason is None and self._is_whole(requests[name]):
                    self._held[name], self._clients[name] = [], client
            elif len(waiting) < PART - 1 and _is_tokens_alone(output):
                waiting.append(output)
            else:
                sent.append(joined([*waiting, output]))
                waiting.clear()
                if output.finish_reason is not None:
                    self._forget(name)
        if len(self._held) > 2 * len(requests) + PART:
            for name in self._held.keys() - requests.keys():  # aborted: nobody waits for them
                self._forget(name)
        return sent

    def take_all(self) -> dict[int, list[Any]]:
        """All that is held, by client."""
        taken: dict[int, list[Any]] = {}
        for name, waiting in self._held.items():
            if waiting:
                taken.setdefault(self._clients[name], []).append(joined(waiting))
                waiting.clear()
        return taken

    def _forget(self, name: str) -> None:
        del self._held[name], self._clients[name]


def _is_whole(request: Any) -> bool:
    """True if the client takes its reply as a whole. The API process, too, reads along for stop texts."""
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling_params
    if sampling is None or sampling.stop or request.resumable:
        return False
    return sampling.output_kind is RequestOutputKind.FINAL_ONLY


def _is_tokens_alone(output: Any) -> bool:
    return (
        output.finish_reason is None
        and output.events is None
        and output.routed_experts is None
        and output.new_prompt_logprobs_tensors is None
        and output.new_sampling_mask is None
    )


def joined(outputs: list[Any]) -> Any:
    """The last output, with the tokens and log-probabilities of all."""
    last = outputs[-1]
    if len(outputs) > 1:
        last.new_token_ids = [token for output in outputs for token in output.new_token_ids]
    if parts := [output.new_logprobs for output in outputs if output.new_logprobs is not None]:
        last.new_logprobs = cut(parts)
    return last


def apply() -> None:
    """Holds outputs back in the engine's own process."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    update, set_version = Scheduler.update_from_output, EngineCore.set_weight_version

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        if model_runner_output.logprobs is not None:
            model_runner_output.logprobs = StepLogprobs(model_runner_output.logprobs)
        outputs = update(self, scheduler_output, model_runner_output)
        for client, each in outputs.items():
            each.outputs = _held_by(self).pass_on(client, each.outputs, self.requests)
        return outputs

    def set_weight_version(self, weight_version: str) -> None:
        if isinstance(self, EngineCoreProc):  # what the weights until now have sampled keeps their version
            for client, outputs in _held_by(self.scheduler).take_all().items():
                message = EngineCoreOutputs(outputs=outputs, weight_version=self._weight_version)
                self.output_queue.put_nowait((client, message))
        set_version(self, weight_version)

    Scheduler.update_from_output = update_from_output
    EngineCore.set_weight_version = set_weight_version


def _held_by(scheduler: Any) -> HeldOutputs:
    if not hasattr(scheduler, "lockstep_held"):
        scheduler.lockstep_held = HeldOutputs(_is_whole)
    return scheduler.lockstep_held
