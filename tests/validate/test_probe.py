"""The proof's comparison of what the server and the trainer compute for the same tokens: figures and refusals.

Shape suffixes: T tokens, V most likely ids.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.backends.probe import Probe, ProbeScores
from lockstep.errors import MismatchError
from lockstep.serving.client import most_likely
from lockstep.tokens.top import TOP

LOG = Path("server.log")
PROBE = Probe.make(300, "float32")
TOKENS = len(PROBE.tokens) - 1


def scores(random: np.random.Generator, vocabulary: int = 300) -> ProbeScores:
    """Random distributions in every place."""
    logprobs_TV = np.log(random.dirichlet(np.ones(vocabulary), TOKENS))
    top_TV = np.argsort(-logprobs_TV, axis=1)[:, :TOP]
    return ProbeScores(logprobs_TV[np.arange(TOKENS), PROBE.tokens[1:]].tolist(), top_TV)


def test_the_same_policy_agrees_in_everything():
    one = scores(np.random.default_rng())
    assert PROBE.compare("m@3", one, one, LOG) == {"probe": 0.0, "top1_overlap": 1.0, "top20_overlap": 1.0}


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), data=st.data())
def test_overlaps_count_what_is_replaced(seed: int, data: st.DataObject):
    """Ranks below the first may be exchanged, ids replaced by others: each counts where it says, and nowhere else."""
    random = np.random.default_rng(seed)
    one = scores(random)
    other_TV = one.top_TV.copy()
    lost, moved = (data.draw(st.integers(0, TOKENS)) for _ in range(2))
    for token in random.permutation(TOKENS)[:lost]:
        other_TV[token, random.integers(1, TOP)] = 1000 + token  # not the best
    for token in random.permutation(TOKENS)[:moved]:
        other_TV[token] = np.roll(other_TV[token], 1)  # another best one, the same set
    found = PROBE.compare("m@3", ProbeScores(one.logprobs, other_TV), one, LOG)
    assert found["top1_overlap"] == pytest.approx(1 - moved / TOKENS)
    assert found["top20_overlap"] == pytest.approx(1 - lost / TOKENS / TOP)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "exact"])
def test_another_policy_is_refused_by_name(dtype: str):
    random = np.random.default_rng()
    probe, one, other = replace(PROBE, dtype=dtype), scores(random), scores(random)
    with pytest.raises(MismatchError, match=r"does not hold m@3.* agree by .*server\.log"):
        probe.compare("m@3", other, one, LOG)
    for wrong in (one.logprobs[:-1], [], [float("nan"), *one.logprobs[1:]]):
        with pytest.raises(MismatchError, match="m@3"):
            probe.compare("m@3", replace(one, logprobs=wrong), one, LOG)
    assert probe.compare("m@3", one, one, LOG)["probe"] == 0.0


def test_the_servers_most_likely_tokens_are_read_by_value():
    """Each place also names the token that stands there, whatever its rank, and in any order."""
    random = np.random.default_rng()
    logprobs_TV = np.log(random.dirichlet(np.ones(50), 9))
    entries: list[dict[str, dict[str, float]] | None] = [None]
    for row in logprobs_TV:
        given = [int(random.integers(50)), *np.argsort(-row)[:5].tolist()]
        entries.append({str(token): {"logprob": float(row[token])} for token in given})
    assert most_likely({"prompt_logprobs": entries}, 5) == np.argsort(-logprobs_TV, axis=1)[:, :5].tolist()
