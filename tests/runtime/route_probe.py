"""Run by the server's own Python: what vLLM's connector hands over in each step, by itself and with ours. Prints JSON.

Shape suffixes: S tokens, L layers, K experts per token.
"""

import json
import random
import sys
import weakref

import numpy as np
from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector, AuxRequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from lockstep_vllm import route_handover


def served(stop, end, steps):
    """([rows or None of each step] of one request, how many requests are still held after its end).

    steps: [(the first token of the worker's rows, [S, L, K], sampled tokens)].
    """
    connector = AuxOutputSchedulerConnector()
    request = Request("a", steps[0][1][:, 0, 0].tolist(), SamplingParams(stop=stop), None)
    connector._sent_hash_counts["a"] = 0
    given = []
    for number, (start, rows_SLK, sampled) in enumerate(steps):
        request.append_output_token_ids([7] * sampled)
        if number == len(steps) - 1 and end:
            request.status = RequestStatus.FINISHED_STOPPED
        rows = connector.take_output(request, {"a": AuxRequestOutput(start, rows_SLK)})
        given.append(None if rows is None else [str(rows.dtype), rows.tolist()])
        rows_SLK[:] = 0  # what is kept must be a copy
    request.status = RequestStatus.FINISHED_ABORTED
    connector.request_finished(request)
    ended = weakref.ref(request)  # with what is kept of it
    del request
    return given, int(ended() is not None)


def drawn(random):
    """A prompt, then one to three tokens a step; their dtype is vLLM's for so many experts."""
    dtype = random.choice(["uint8", "uint16"])
    numbers = np.random.default_rng(random.randrange(1 << 30))
    layers, topk = random.randint(1, 5), random.randint(1, 4)
    start, steps = 0, []
    for rows, sampled in [
        (random.randint(1, 9), 1),
        *((k, k) for k in random.choices([1, 2, 3], k=random.randint(0, 6))),
    ]:
        steps.append((start, numbers.integers(0, np.iinfo(dtype).max, (rows, layers, topk)).astype(dtype), sampled))
        start += rows
    return steps


def copied(steps):
    return [(start, rows_SLK.copy(), sampled) for start, rows_SLK, sampled in steps]


cases = [drawn(random.Random()) for _ in range(30)]
ways = [([], True), (["x"], True), ([], False)]
vllms = [[served(*way, copied(steps))[0] for steps in cases] for way in ways]
route_handover.apply()
ours = [[served(*way, copied(steps)) for steps in cases] for way in ways]
sys.stdout.write("RESULT " + json.dumps([vllms, ours]) + "\n")
