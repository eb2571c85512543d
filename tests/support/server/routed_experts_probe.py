"""Run by the server's own Python: vLLM's scheduler and its KV cache with random traffic, and a
worker that computes nothing but routed experts.

    python routed_experts_probe.py SEED MODEL,plain|hybrid,STEPS ...

So many steps are under way at a time (1 or 2). A row of routed experts says which tokens it belongs
to (a hash of all up to its own) and in which step it was computed. Prints JSON: what vLLM itself
does, then of each case for each request its token ids, the length of its prompt, the rows that it
was given with each of its tokens, and the step that computed each token first.

Shape suffixes: S tokens, L layers, K experts per token.
"""

import json
import random
import sys
import zlib
from collections import deque

import numpy as np
import torch
from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector, AuxRequestOutput
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, resolve_kv_cache_block_sizes
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from lockstep_vllm.routed_experts import capture
from lockstep_vllm.routed_experts.pool import StepExperts

BLOCK, BLOCKS = 16, {"plain": 22, "hybrid": 38}


def row_of(tokens, step):
    """[L, K]: two layers, the second with the step in which it was computed."""
    digest = zlib.crc32(np.array(tokens, np.int32).tobytes())
    return [[digest & 255, digest >> 8 & 255], [step & 255, step >> 8]]


class Worker:
    """What the real one knows of each request: its tokens, and its blocks in the group whose positions count."""

    def __init__(self, cache):
        self.cache, self.tokens, self.blocks, self.first = cache, {}, {}, {}
        self.step = 0

    def learn(self, scheduled):
        group = self.cache.group
        for new in scheduled.scheduled_new_reqs:
            known = self.tokens.get(new.req_id, [])
            self.tokens[new.req_id] = known or list(new.prompt_token_ids)
            self.blocks[new.req_id] = list(new.block_ids[group])
        cached = scheduled.scheduled_cached_reqs
        for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:
                self.blocks[name] = []
            self.blocks[name] += blocks[group] if blocks else []

    def run(self, scheduled):
        """The step's output: every row, and a random token for each request whose tokens are all computed."""
        self.learn(scheduled)
        cached = scheduled.scheduled_cached_reqs
        starts = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        starts |= zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        self.step += 1
        names, rows, positions, sampled = list(scheduled.num_scheduled_tokens), [], [], []
        for name in names:
            tokens, blocks = self.tokens[name], self.blocks[name]
            end = starts[name] + scheduled.num_scheduled_tokens[name]
            for position in range(starts[name], end):
                rows.append(row_of(tokens[: position + 1], self.step))
                positions.append((blocks[position // BLOCK] * BLOCK + position % BLOCK, tokens[position]))
                self.first.setdefault((name, position), self.step)
            sampled.append([random.randrange(1000)] if end == len(tokens) else [])
            tokens += sampled[-1]
        step = StepExperts(np.array(rows, np.uint8), np.array(positions).T, self.cache)
        index = {name: number for number, name in enumerate(names)}
        return ModelRunnerOutput(names, index, sampled, aux_output_connector_output={"step": step} if rows else None)


def make_scheduler(folder, kind, steps):
    arguments = EngineArgs(
        model=folder,
        dtype="float32",
        max_model_len=256,
        block_size=BLOCK,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        enable_prefix_caching=True,
        async_scheduling=steps > 1,
    )
    config = arguments.create_engine_config()
    # Asked for earlier, it wants the model runner that a CPU hasn't.
    config.aux_output_config.enable_return_routed_experts = True
    config.cache_config.num_gpu_blocks, config.cache_config.block_size = BLOCKS[kind], BLOCK
    attention = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    groups = [KVCacheGroupSpec(["attention"], attention)]
    if kind == "hybrid":
        config.cache_config.mamba_block_size, config.cache_config.mamba_cache_mode = BLOCK, "align"
        config.cache_config.prefix_match_unit = 4
        mamba = MambaSpec(block_size=BLOCK, shapes=((8, 32),), dtypes=(torch.float32,), mamba_cache_mode="align")
        groups.insert(0, KVCacheGroupSpec(["mamba"], mamba))
    cache_config = KVCacheConfig(num_blocks=BLOCKS[kind], kv_cache_tensors=[], kv_cache_groups=groups)
    block_size, hash_size = resolve_kv_cache_block_sizes(cache_config, config)
    make = AsyncScheduler if steps > 1 else Scheduler
    scheduler = make(config, cache_config, StructuredOutputManager(config), block_size, hash_size, log_stats=True)
    init_none_hash(sha256)
    return scheduler, get_request_block_hasher(hash_size, sha256), capture.cache_of(config, cache_config)


def traffic(count):
    """(prompt, tokens to sample, stop strings): some begin like another one, and go on differently."""
    prompts = []
    for _ in range(count):
        prompt = [random.randrange(1000) for _ in range(random.randint(1, 90))]
        if prompts and random.random() < 0.6:
            shared = random.choice(prompts)
            prompt = shared[: random.randint(1, len(shared))] + prompt[:10]
        prompts.append(prompt)
        yield prompt, random.randint(1, 60), ["x"] if random.random() < 0.2 else []


def begin(scheduler, hasher, name, prompt, tokens, stop):
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, stop=stop)
    request = Request(name, prompt, params, None, block_hasher=hasher)
    scheduler.add_request(request)
    return request


def drive(scheduler, hasher, worker, steps):
    """(requests by name, what each was given with its tokens, blocks that were copied), with so many steps under way."""
    waiting, under_way = list(traffic(60)), deque()
    requests, given, copies = {}, {}, 0
    while waiting or scheduler.has_requests() or under_way:
        while waiting and random.random() < 0.5:
            name = f"r{len(requests)}"
            requests[name], given[name] = begin(scheduler, hasher, name, *waiting.pop()), []
        running = [name for name in given if name in scheduler.requests]
        if running and random.random() < 0.02:
            scheduler.finish_requests([random.choice(running)], RequestStatus.FINISHED_ABORTED)
        scheduled = scheduler.schedule()
        copies += len(scheduled.kv_cache_block_copies or [])
        under_way.append((scheduled, worker.run(scheduled)))
        while len(under_way) >= steps or (under_way and not scheduler.has_requests()):
            for outputs in scheduler.update_from_output(*under_way.popleft()).values():
                for output in outputs.outputs:
                    rows = None if output.routed_experts is None else output.routed_experts.tolist()
                    given[output.request_id].append(rows)
    return requests, given, copies


def captured(folder, kind, steps):
    scheduler, hasher, cache = make_scheduler(folder, kind, steps)
    worker = Worker(cache)
    requests, given, copies = drive(scheduler, hasher, worker, steps)
    reports = [
        {
            "tokens": list(request.all_token_ids),
            "prompt": request.num_prompt_tokens,
            "stop": bool(request.sampling_params.stop),
            "aborted": request.status == RequestStatus.FINISHED_ABORTED,
            "given": given[name],
            "first": [worker.first.get((name, position)) for position in range(request.num_tokens - 1)],
        }
        for name, request in requests.items()
    ]
    preempted = sum(request.num_preemptions for request in requests.values())
    return {"requests": reports, "copies": copies, "preempted": preempted}


def vllms_own():
    """Whether vLLM's own connector sends rows with each token of a request."""
    connector, request, came = AuxOutputSchedulerConnector(), Request("a", [1, 2, 3], SamplingParams(), None), []
    for start, rows in [(0, 3), (3, 1), (4, 1)]:
        request.append_output_token_ids([7])
        output = AuxRequestOutput(start, np.zeros((rows, 2, 2), np.uint8))
        came.append(connector.take_output(request, {"a": output}) is not None)
    return came


def main():
    random.seed(int(sys.argv[1]))
    results = [vllms_own()]
    capture.apply()
    results += [
        captured(folder, kind, int(steps)) for folder, kind, steps in (case.split(",") for case in sys.argv[2:])
    ]
    sys.stdout.write("RESULT " + json.dumps(results) + "\n")


main()
