"""Routed experts from the model's routers to the reply, with next to no work per token.

vLLM 0.32 keeps its routers' choices (`RoutedExpertsCapturer`, used here as it is). It then puts
each request's row of each step into buffers, keyed blocks and a store with a thread of its own, and
sends the row to the API process with the token. With 64 requests that is some 0.5 ms of Python
between two steps, which is lost where the GPU waits for Python. It is also a tenth of the API
process's time for a token. A reply has its routed experts at its end only. So here a step's rows go
into a pool as one array, each at the slot of its token in the KV cache (`pool.py`). A request's
rows are read from the pool once, when the request ends.

A request that is preempted loses its blocks: its rows are read before, so that it keeps those it
was sampled with. A request with stop strings gets its rows step by step, as from vLLM. The API
process finds those strings, and ends the request without asking the engine for more. A request that
is ended from outside (its client left) has no routed experts. If rows are missing, the reply holds
the rows before the first gap, and training on it raises an error that names the tokens.

`tests/server/replay/test_routed_experts_capture.py` drives vLLM's own scheduler with it, and fails
when vLLM hands over once by itself, and this is no longer needed.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lockstep_vllm.routed_experts.pool import Cache, RoutedExpertsPool, StepExperts


def apply() -> None:
    """Called once in each process of vLLM."""
    from vllm.v1.core.sched import scheduler
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    replace(scheduler, "AuxOutputSchedulerConnector", SchedulerExperts)
    update, start = scheduler.Scheduler.update_from_output, WorkerWrapperBase.init_device

    def update_from_output(self, scheduler_output, model_runner_output) -> Any:
        """Runs with or without an output for a request of the step: a prompt's chunk, or a request
        that has left.
        """
        if self.aux_output_connector is not None:
            self.aux_output_connector.kv_cache_manager = self.kv_cache_manager
            self.aux_output_connector.put(scheduler_output, model_runner_output)
        return update(self, scheduler_output, model_runner_output)

    def init_device(self) -> None:
        """Only here, since vLLM's module brings its kernels along, which the API process has no use
        for.
        """
        from vllm.distributed.aux_output_connector import worker

        replace(worker, "AuxOutputWorkerConnector", WorkerExperts)
        start(self)

    scheduler.Scheduler.update_from_output = update_from_output
    WorkerWrapperBase.init_device = init_device


def replace(module: Any, name: str, ours: type) -> None:
    assert hasattr(module, name), (
        f"vLLM's {module.__name__} has no {name} any more: lockstep_vllm/routed_experts/capture.py replaces it"
    )
    setattr(module, name, ours)


@dataclass
class Taken:
    """Rows that a request has had from the pool so far, where that was before its end."""

    rows: list[np.ndarray] = field(default_factory=list)
    count: int = 0
    blocks: list[int] = field(default_factory=list)
    """Its blocks when it was preempted: a step was still under way then, and its rows come at those
    positions.
    """


class SchedulerExperts:
    """In the scheduler's process; the methods are those that vLLM's scheduler calls on its own
    connector.
    """

    kv_cache_manager: Any = None

    def __init__(self) -> None:
        self.pool: RoutedExpertsPool | None = None

    def build_connector_meta(self, scheduler_output: Any, requests: Any) -> bool:
        """Informs the worker that the step is one of requests: vLLM's steps to warm up have no
        metadata.
        """
        return True

    def put(self, scheduler_output: Any, model_runner_output: Any) -> None:
        """A step's output, before anything else is done with it. Steps come in the order in which
        they ran.
        """
        if self.pool and scheduler_output.kv_cache_block_copies:
            self.pool.copy_blocks(scheduler_output.kv_cache_block_copies)
        output = model_runner_output.aux_output_connector_output
        if output:
            step = output["step"]
            self.pool = self.pool or RoutedExpertsPool(step)
            self.pool.put(step)

    def take_output(self, request: Any, output: Any) -> np.ndarray | None:
        """[S, L, K]: all that a request is given with this step's token; most steps give nothing."""
        step_by_step, ended = bool(request.sampling_params.stop), request.is_finished()
        has_blocks = request.num_computed_tokens > 0  # none while it is preempted
        if has_blocks and not (step_by_step or ended):
            return None
        taken = taken_by(request)
        self.take(request, self.blocks(request) if has_blocks else taken.blocks)
        if not (step_by_step or ended):
            return None
        rows_SLK = np.concatenate(taken.rows)
        taken.rows = []
        return rows_SLK

    def request_finished(self, request: Any) -> None:
        """Also called for a request that is preempted, while it has its blocks."""
        if request.is_finished() or self.pool is None:
            return
        taken = taken_by(request)
        taken.blocks = self.blocks(request)
        if request.num_output_tokens and not request.sampling_params.stop:
            self.take(request, taken.blocks)

    def reset(self) -> None:
        """The prefix cache is empty now: nothing to do, every block is written before it is read."""

    def blocks(self, request: Any) -> list[int]:
        assert self.pool is not None
        return self.kv_cache_manager.get_block_ids(request.request_id)[self.pool.cache.group]

    def take(self, request: Any, blocks: list[int]) -> None:
        """Rows up to the last token but one: the last was not computed yet."""
        assert self.pool is not None
        taken = taken_by(request)
        rows_SLK = self.pool.read(blocks, taken.count, request.all_token_ids[taken.count : request.num_tokens - 1])
        taken.rows.append(rows_SLK)
        taken.count += len(rows_SLK)


def taken_by(request: Any) -> Taken:
    """Kept with vLLM's request, so that it ends with it."""
    if not hasattr(request, "lockstep_taken"):
        first = min(request.sampling_params.routed_experts_prompt_start, request.num_prompt_tokens)
        request.lockstep_taken = Taken(count=first)
    return request.lockstep_taken


@dataclass
class PendingExperts:
    """A step's rows on their way to the CPU."""

    rows_gpu: Any
    positions_gpu: Any
    cache: Cache
    step: StepExperts | None = None

    def enqueue_cpu_copy(self, num_sampled: Any, num_rejected: Any) -> None:
        """Called on the stream for outputs; vLLM waits for it before `process_output`."""
        rows, positions = (
            tensor.to("cpu", non_blocking=True).numpy() for tensor in (self.rows_gpu, self.positions_gpu)
        )
        self.step = StepExperts(rows, positions, self.cache)

    def process_output(self) -> dict[str, StepExperts]:
        assert self.step is not None
        return {"step": self.step}


class WorkerExperts:
    """Captures routed experts in each worker. vLLM's model runner calls its methods as those of
    vLLM's own connector.
    """

    def __init__(self, *, vllm_config: Any, model: Any, kv_cache_config: Any) -> None:
        from vllm.distributed.parallel_state import get_tp_group
        from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
            RoutedExpertsCapturer,
            bind_routed_experts_capturer,
        )

        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.capturer = RoutedExpertsCapturer(max_num_batched_tokens=tokens, vllm_config=vllm_config)
        bind_routed_experts_capturer(model, self.capturer)
        self.sends = get_tp_group().is_first_rank
        self.cache = cache_of(vllm_config, kv_cache_config)
        self.slots_GS: Any = None
        self.captured = False
        self.watch_slots()

    def watch_slots(self) -> None:
        """Keep the cache slots of the tokens of each step ([group, S], on the device), which vLLM
        computes before it runs the step.
        """
        from vllm.v1.worker.gpu.block_table import BlockTables

        vllms = BlockTables.compute_slot_mappings

        def compute_slot_mappings(tables, *arguments: Any, **options: Any) -> Any:
            self.slots_GS = vllms(tables, *arguments, **options)
            return self.slots_GS

        BlockTables.compute_slot_mappings = compute_slot_mappings

    def begin_step(self, metadata: bool | None) -> None:
        self.captured = metadata is not None

    def prepare_output(self, input_batch: Any) -> PendingExperts | None:
        """Copies of what the next step writes over: rows, slots and token ids."""
        import torch

        if not (self.sends and self.captured):
            return None
        size = int(input_batch.query_start_loc_np[len(input_batch.req_ids)])
        positions = torch.stack((self.slots_GS[self.cache.group, :size], input_batch.input_ids[:size]))
        return PendingExperts(self.capturer.snapshot_routing_data(size), positions, self.cache)

    def close(self) -> None:
        """Nothing is held open here."""


def cache_of(vllm_config: Any, kv_cache_config: Any) -> Cache:
    """The layout of the server's KV cache. Raises ValueError where a token's keys have no place of
    their own in the cache.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    parallel = vllm_config.parallel_config
    if (
        vllm_config.kv_transfer_config
        or parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1
    ):
        raise ValueError(
            "routed experts are captured by a server whose KV cache is its own and whole: "
            "start it without a KV transfer and without context parallelism, or set enable_expert_replay=False"
        )
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = getattr(group.kv_cache_spec, "first_spec", group.kv_cache_spec)
        if isinstance(spec, FullAttentionSpec):
            return Cache(number, kv_cache_config.num_blocks, spec.block_size)
    raise ValueError("routed experts are captured for models with full attention in some layer, and this one has none")
