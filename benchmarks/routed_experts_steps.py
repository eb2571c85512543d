"""Run by the server's own Python (`routed_experts_capture.py`): seconds of each step, by vLLM's own way and by the pool's. Prints JSON.

    python routed_experts_steps.py REQUESTS LAYERS

Shape suffixes: N requests (a token each), L layers, K experts per token.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from vllm.distributed.aux_output_connector import connector, worker
from vllm.distributed.aux_output_connector.routed_experts import RoutedExpertsBuffer
from vllm.distributed.aux_output_connector.store import BackgroundBlockObjectStore, BlockObjectStore

from lockstep_vllm.routed_experts.capture import PendingExperts, SchedulerExperts
from lockstep_vllm.routed_experts.pool import Cache

BLOCK, TOP_K, STEPS, PROMPT = 16, 8, 2000, 512


def running(requests: int) -> dict[str, SimpleNamespace]:
    """Requests somewhere on their way, with what both ways look at."""
    live = {}
    for number in range(requests):
        name, length = f"cmpl-{number}-0123456789abcdef0123456789", random.randrange(600, 1500)
        live[name] = SimpleNamespace(
            request_id=name,
            num_prompt_tokens=PROMPT,
            num_output_tokens=length - PROMPT,
            num_tokens=length,
            num_computed_tokens=length,
            is_finished=lambda: False,
            sampling_params=SimpleNamespace(routed_experts_prompt_start=0, stop=[]),
            block_hashes=[os.urandom(32) for _ in range(length // BLOCK)],
        )
    return live


def vllms_worker(live: dict[str, SimpleNamespace], layers: int) -> worker.AuxOutputWorkerConnector:
    """Without a model; its store is full after some hundred steps."""
    there = worker.AuxOutputWorkerConnector.__new__(worker.AuxOutputWorkerConnector)
    size = BLOCK * layers * TOP_K
    blocks = sum(len(request.block_hashes) for request in live.values()) + len(live) * STEPS // BLOCK
    store = BlockObjectStore(max_bytes=blocks * size, object_nbytes=size)
    there._store = BackgroundBlockObjectStore(store, max_pending_batches=2 * len(live))
    there._buffer = RoutedExpertsBuffer(np.dtype(np.uint8), (layers, TOP_K), BLOCK, len(live), 8192, 2)
    there._requests, there._pending_outputs, there._lock = {}, [], threading.Lock()
    there._generation, there._step_metadata, there._max_concurrent_batches = 0, None, 2
    return there


def vllms_way(live: dict[str, SimpleNamespace], rows_NLK: np.ndarray) -> Callable[[], None]:
    here, there = connector.AuxOutputSchedulerConnector(), vllms_worker(live, rows_NLK.shape[1])
    scheduled = SimpleNamespace(num_scheduled_tokens=dict.fromkeys(live, 1))
    ones, none = np.ones(len(live), np.int32), np.zeros(len(live), np.int32)
    bounds = np.arange(len(live) + 1)
    there.begin_step(here.build_connector_meta(scheduled, live))
    for name, request in live.items():  # as if it had been there from its first token on
        place, state = request.num_tokens - 1, there._requests[name]
        state.capture_cursor = state.scheduled_cursor = state.emit_cursor = place
        there._buffer._tail(name, place // BLOCK * BLOCK).length = place % BLOCK

    def step() -> None:
        there.begin_step(here.build_connector_meta(scheduled, live))
        starts = np.array([request.num_tokens - 1 for request in live.values()])
        pending = worker.PendingAuxOutput(there, list(live), starts, bounds, torch.empty(0), rows_NLK, ones, none)
        there._pending_outputs.append(pending)
        for state in there._requests.values():
            state.pending_outputs += 1
        output = there.process_output(pending)
        for request in live.values():
            request.num_tokens += 1
            here.take_output(request, output)

    return step


def pools_way(live: dict[str, SimpleNamespace], rows_NLK: np.ndarray) -> Callable[[], None]:
    here, rows = SchedulerExperts(), torch.from_numpy(rows_NLK)
    cache, scheduled = Cache(0, 256 * len(live), BLOCK), SimpleNamespace(kv_cache_block_copies=None)
    firsts_N = torch.randperm(cache.blocks)[: len(live)] * BLOCK
    positions = [torch.stack((firsts_N + position, firsts_N)) for position in range(BLOCK)]

    def step() -> None:
        here.build_connector_meta(scheduled, live)
        pending = PendingExperts(rows, random.choice(positions), cache)
        pending.enqueue_cpu_copy(0, 0)
        output = pending.process_output()
        here.put(scheduled, SimpleNamespace(aux_output_connector_output=output))
        for request in live.values():
            request.num_tokens += 1
            here.take_output(request, output)

    return step


def main() -> None:
    requests, layers = map(int, sys.argv[1:])
    rows_NLK = np.random.default_rng(0).integers(0, 255, (requests, layers, TOP_K), np.uint8)
    seconds: dict[str, list[float]] = {}
    for way, make in (("vllm", vllms_way), ("pool", pools_way)):
        live = running(requests)
        step, seconds[way] = make(live, rows_NLK), []
        for _ in range(STEPS):
            start = time.perf_counter()
            step()
            seconds[way].append(time.perf_counter() - start)
            for request in live.values():
                if request.num_tokens // BLOCK > len(request.block_hashes):
                    request.block_hashes.append(os.urandom(32))
    sys.stdout.write("RESULT " + json.dumps(seconds) + "\n")


if __name__ == "__main__":
    main()
