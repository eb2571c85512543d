"""The verification's comparison of what the server and the trainer compute for the same tokens: figures, limits and refusals.

Shape suffixes: T tokens, V most likely ids.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.backends.megatron.probe import (
    ROW,
    TOKENS,
    Noise,
    Probe,
    ProbeScores,
    base_noise,
    check_finite,
    compare,
    power,
)
from lockstep.batching.prefix_tree import TokenSequence
from lockstep.batching.top_logprobs import TOP
from lockstep.errors import MismatchError, TrainerError
from lockstep.inference.client import most_likely

LOG = Path("server.log")
SCORED = 500
NONE = Noise(0.0, 0.0, 0.0, 0.0, 0.0)


def scores(random: np.random.Generator, vocabulary: int = 300) -> ProbeScores:
    """Random distributions in every place."""
    logprobs_TV = np.log(random.dirichlet(np.ones(vocabulary), SCORED))
    top_TV = np.argsort(-logprobs_TV, axis=1)[:, :TOP]
    return ProbeScores(logprobs_TV[np.arange(SCORED), random.integers(vocabulary, size=SCORED)], top_TV)


def off_by(base: ProbeScores, random: np.random.Generator, nats: float) -> ProbeScores:
    """The same with noise whose mean size is `nats` for each nat of a token's surprisal, as rounding's is."""
    scale_T = nats * np.maximum(1.0, -base.logprobs_T)
    return replace(base, logprobs_T=base.logprobs_T + random.laplace(size=SCORED) * scale_T)


def test_the_same_policy_agrees_in_everything():
    same = scores(np.random.default_rng())
    figures = compare("m@3", same, same, NONE, "float32", LOG)
    zero = dict.fromkeys(("probe", "probe_p99", "probe_noise", "probe_ratio"), 0)
    assert figures == zero | {"top1_overlap": 1, "top20_overlap": 1}


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), data=st.data())
def test_overlaps_count_what_is_replaced(seed: int, data: st.DataObject):
    """Ranks below the first may be exchanged, ids replaced by others: each counts where it says, and nowhere else."""
    random = np.random.default_rng(seed)
    base = scores(random)
    other_TV = base.top_TV.copy()
    lost, moved = (data.draw(st.integers(0, SCORED)) for _ in range(2))
    for token in random.permutation(SCORED)[:lost]:
        other_TV[token, random.integers(1, TOP)] = 1000 + token  # not the best
    for token in random.permutation(SCORED)[:moved]:
        other_TV[token] = np.roll(other_TV[token], 1)  # another best one, the same set
    figures = compare("m@3", replace(base, top_TV=other_TV), base, NONE, "float32", LOG)
    assert figures["top1_overlap"] == pytest.approx(1 - moved / SCORED)
    assert figures["top20_overlap"] == pytest.approx(1 - lost / SCORED / TOP)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "exact"])
def test_another_policy_is_refused_by_name(dtype: str):
    random = np.random.default_rng()
    base, other = scores(random), scores(random)
    with pytest.raises(MismatchError, match=r"does not hold m@3.* agree by .*server\.log"):
        compare("m@3", other, base, NONE, dtype, LOG)
    for wrong in (base.logprobs_T[:-1], base.logprobs_T[:0], np.append(base.logprobs_T[1:], np.nan)):
        with pytest.raises(MismatchError, match="m@3"):
            compare("m@3", replace(base, logprobs_T=wrong), base, NONE, dtype, LOG)
    assert compare("m@3", base, base, NONE, dtype, LOG)["probe"] == 0.0


def test_a4_the_limit_follows_the_measured_noise():
    """In bf16 a real model on random ids was at 0.087 nats, where the constant of before allowed 0.06: its own noise says what is right.

    A policy that grows sure moves the noise of its unlikely tokens by more than that of the others: no right step may be refused for it.
    """
    random = np.random.default_rng()
    base = scores(random)
    noise = base_noise(off_by(base, random, 0.014), base, "bfloat16", LOG)
    assert noise.scaled == pytest.approx(0.014, rel=0.3)
    sure = replace(base, logprobs_T=base.logprobs_T * random.uniform(1, 4, SCORED))
    right = compare("m@3", off_by(sure, random, 0.027), sure, noise, "bfloat16", LOG)
    assert right["probe_noise"] == noise.mean
    assert right["probe"] > 4 * noise.mean
    quiet = base_noise(off_by(base, random, 0.002), base, "bfloat16", LOG)
    with pytest.raises(MismatchError, match=r"allowed (9\.\d|1\.[01])e-0[23].* on the base weights"):
        compare("m@3", off_by(base, random, 0.027), base, quiet, "bfloat16", LOG)
    # fp32's own limits hold however quiet the base was, and exact ones however loud.
    assert compare("m@3", off_by(base, random, 1e-5), base, NONE, "float32", LOG)
    with pytest.raises(MismatchError, match="does not hold m@3"):
        compare("m@3", off_by(base, random, 1e-4), base, NONE, "float32", LOG)
    with pytest.raises(MismatchError, match="at most"):
        compare("m@3", off_by(base, random, 1e-5), base, Noise(1.0, 1.0, 1.0, 1.0, 1.0), "exact", LOG)


@pytest.mark.parametrize(
    ("dtype", "nats"), [("float32", 0.01), ("bfloat16", 0.6), ("exact", 1e-5), ("bfloat16", np.nan)]
)
def test_two_programs_that_disagree_on_the_base_are_refused(dtype: str, nats: float):
    random = np.random.default_rng()
    base = scores(random)
    with pytest.raises(MismatchError, match="do not compute the same model"):
        base_noise(replace(base, logprobs_T=base.logprobs_T + nats), base, dtype, LOG)


def test_power_is_the_step_in_units_of_the_noise():
    random = np.random.default_rng()
    base = scores(random)
    noise = Noise(0.2, 0.4, 0.6, 0.02, 0.05)
    assert power(
        replace(base, logprobs_T=base.logprobs_T - 0.05 * np.maximum(1, -base.logprobs_T)), base, noise
    ) == pytest.approx(2.5)
    assert power(base, base, noise) == 0.0


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_what_is_not_finite_is_refused_by_name(value: float):
    base = scores(np.random.default_rng())
    check_finite("m@2", base, "lower learning_rate")
    base.logprobs_T[7] = value
    with pytest.raises(TrainerError, match=r"m@2 computes 1 of 500 .* lower learning_rate"):
        check_finite("m@2", base, "lower learning_rate")


def sequence(
    random: np.random.Generator, group: int, length: int, prompt: int, routed_experts: bool = False
) -> TokenSequence:
    return TokenSequence(
        name=f"group {group}",
        tokens_S=random.integers(0, 1000, length).astype(np.int32),
        loss_mask_S=np.arange(length) >= prompt,
        logprobs_S=np.zeros(length, np.float32),
        temperatures_S=np.full(length, 0.7, np.float32),
        experts_SLK=random.integers(0, 8, (length, 2, 2)).astype(np.uint8) if routed_experts else None,
        routed_S=np.arange(length) < length - 1 if routed_experts else None,
        group=group,
    )


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**31), groups=st.integers(1, 9), longest=st.integers(48, 4000), routed_experts=st.booleans()
)
def test_a_probe_is_text_of_the_rollouts_and_fits_its_row(seed: int, groups: int, longest: int, routed_experts: bool):
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 2000, (groups, 3))
    rollouts = [
        sequence(random, group, int(length), int(random.integers(1, length)), routed_experts)
        for group in range(groups)
        for length in lengths[group]
    ]
    probe = Probe.of_rollouts(rollouts, longest)
    total = sum(len(part) for part in probe.sequences)
    assert total <= ROW
    assert total >= min(TOKENS, sum(min(len(part), longest) for part in rollouts))
    texts = ["".join(map(chr, part.tokens_S)) for part in rollouts]
    for part, tokens in zip(probe.sequences, probe.tokens, strict=True):
        assert len(part) <= longest
        assert any("".join(map(chr, tokens)) in text for text in texts)
        assert part.loss_mask_S.tolist() == [False] + [True] * (len(part) - 1)
        assert (part.temperatures_S == 1).all()
    if routed_experts:  # they hold from the beginning of a text only
        assert all(any("".join(map(chr, t)) == text[: len(t)] for text in texts) for t in probe.tokens)
    # A group's second rollout comes after every group's first.
    if total < TOKENS:
        assert len(probe.sequences) == len(rollouts)


def test_a_long_rollout_is_probed_where_it_replies():
    random = np.random.default_rng()
    long = sequence(random, 0, 5000, 4000)
    (cut,) = Probe.of_rollouts([long], 600).sequences
    start = "".join(map(chr, long.tokens_S)).index("".join(map(chr, cut.tokens_S)))
    assert start < 4000 < start + len(cut) - 300


def test_the_servers_most_likely_tokens_are_read_by_value():
    """Each place also names the token that stands there, whatever its rank, and in any order."""
    random = np.random.default_rng()
    logprobs_TV = np.log(random.dirichlet(np.ones(50), 9))
    entries: list[dict[str, dict[str, float]] | None] = [None]
    for row in logprobs_TV:
        given = [int(random.integers(50)), *np.argsort(-row)[:5].tolist()]
        entries.append({str(token): {"logprob": float(row[token])} for token in given})
    assert most_likely({"prompt_logprobs": entries}, 5) == np.argsort(-logprobs_TV, axis=1)[:, :5].tolist()
