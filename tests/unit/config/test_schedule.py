"""The learning rate of each step: closed forms, never zero, and what is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.config.train import TrainConfig
from lockstep.errors import ConfigError


def rates(config: TrainConfig, steps: int) -> list[float]:
    return [config.at_step(step).learning_rate for step in range(1, steps + 1)]


def test_closed_forms():
    assert rates(TrainConfig(learning_rate=2.0), 3) == [2.0, 2.0, 2.0]
    assert rates(TrainConfig(learning_rate=1.0, warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    linear = TrainConfig(learning_rate=1.0, lr_schedule="linear", warmup_steps=2, schedule_steps=6)
    assert rates(linear, 6) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = TrainConfig(learning_rate=1.0, lr_schedule="cosine", schedule_steps=4, min_lr_ratio=0.1)
    by_hand = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert rates(cosine, 4) == pytest.approx(by_hand)
    wsd = TrainConfig(learning_rate=1.0, lr_schedule="wsd", warmup_steps=1, schedule_steps=7, decay_steps=3)
    assert rates(wsd, 7) == [1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    later = linear.model_copy(update={"schedule_start": 10})
    assert [later.at_step(10 + step).learning_rate for step in range(1, 7)] == rates(linear, 6)


@given(
    schedule=st.sampled_from(["linear", "cosine", "wsd"]),
    warmup=st.integers(0, 5),
    decay=st.integers(1, 5),
    more=st.integers(1, 20),
    least=st.sampled_from([0.0, 0.3]),
)
def test_rates_rise_then_fall_and_are_never_zero(schedule, warmup, decay, more, least):
    total = warmup + decay + more
    wsd = {"decay_steps": decay} if schedule == "wsd" else {}
    config = TrainConfig(
        learning_rate=1.0, lr_schedule=schedule, warmup_steps=warmup, schedule_steps=total, min_lr_ratio=least, **wsd
    )
    scheduled = rates(config, total)
    assert max(scheduled) == 1.0
    assert all(rate > 0 for rate in scheduled)
    peak = max(0, warmup - 1)
    assert scheduled[: peak + 1] == sorted(scheduled[: peak + 1])
    assert scheduled[peak:] == sorted(scheduled[peak:], reverse=True)
    assert all(rate >= least for rate in scheduled[peak:])


def test_a_run_gives_the_schedule_its_length():
    asked = TrainConfig(lr_schedule="linear", schedule_start=20)
    with pytest.raises(ConfigError, match="lr_schedule = linear needs schedule_steps"):
        asked.at_step(21)
    assert asked.over(50).schedule_steps == 30
    assert asked.over(50).lr_schedule == "linear"
    assert TrainConfig(warmup_steps=3).over(50).schedule_steps is None
    with pytest.raises(ConfigError, match="step 51 is beyond the schedule, whose last is 50"):
        asked.over(50).at_step(51)
    with pytest.raises(ConfigError, match="schedule_steps = 5 leaves no room for warmup_steps = 5"):
        TrainConfig(lr_schedule="cosine", warmup_steps=5).over(5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"schedule_steps": 5}, "schedule_steps has no effect with lr_schedule = constant"),
        ({"min_lr_ratio": 0.1}, "min_lr_ratio has no effect with lr_schedule = constant"),
        ({"schedule_start": 5}, "schedule_start has no effect without a schedule or a warm-up"),
        ({"lr_schedule": "wsd"}, "decay_steps goes with lr_schedule = wsd"),
        ({"lr_schedule": "linear", "decay_steps": 3}, "decay_steps goes with lr_schedule = wsd"),
        ({"lr_schedule": "step"}, "lr_schedule = 'step'"),
    ],
)
def test_what_has_no_effect_is_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        TrainConfig(**settings)
