"""Senders tell each other what came of a step: everyone's values, or the error that came first, on every rank."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from lockstep.engine.weight_sync.sender_group import StoreSenderGroup, run_on_all
from lockstep.errors import ServerError, TrainerError, WeightsError


def both(*steps, deadline_s=30.0):
    """What two ranks get from a series of steps, or the error they raise; each step is a pair of functions."""
    store = dist.HashStore()

    def rank(number):
        senders, results = StoreSenderGroup(store, number, 2), []
        for step in steps:
            try:
                results.append(run_on_all(senders, step[number], deadline_s))
            except (ServerError, TrainerError, WeightsError) as error:
                results.append((type(error), str(error)))
        return results

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rank, (0, 1)))


def fails(error):
    def step():
        raise error

    return step


def test_values_and_the_first_error_reach_every_rank():
    failed = threading.Event()

    def broken():
        failed.set()
        raise WeightsError("the cause")

    def consequence():
        assert failed.wait(30.0)
        time.sleep(0.05)
        raise ServerError("what followed")

    steps = [
        (lambda: 1, lambda: {"a": [2]}),
        (lambda: None, fails(ValueError("unforeseen"))),
        (consequence, broken),
        (lambda: "still", lambda: "in step"),
        (lambda: 4, lambda: 5),
    ]
    first, second = both(*steps)
    assert first == second
    assert first[0] == [1, {"a": [2]}]
    assert first[1] == (TrainerError, "sender 1: ValueError: unforeseen")
    assert first[2] == (WeightsError, "the cause")
    assert first[3:] == [["still", "in step"], [4, 5]]


def test_a_rank_that_does_not_come_is_named():
    senders = StoreSenderGroup(dist.HashStore(), 0, 2)
    with pytest.raises(TrainerError, match="sender 1 timed out after"):
        run_on_all(senders, lambda: 1, 0.5)
