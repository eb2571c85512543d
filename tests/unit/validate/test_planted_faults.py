"""The planted faults: declared once, each with its stage, and detected on a model with every kind of part."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.models.registry import load_model_config
from lockstep.models.tiny.write import write_tiny
from lockstep.validate.faults.registry import FAULTS
from lockstep.validate.figures import PASSED
from lockstep.validate.registry import stage_named, stage_names
from lockstep.validate.request import Request
from lockstep.validate.runner import run_one

SMALL = {"num_hidden_layers": 2, "full_attention_interval": 2, "hidden_size": 64, "dtype": "float32"}
SMALL |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "tie_word_embeddings": True}
SMALL |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}


def test_every_fault_says_what_it_stands_for_and_who_must_see_it() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 20
    assert {fault.stage for fault in FAULTS} <= set(stage_names())
    assert all(len(fault.stands_for.split()) >= 4 for fault in FAULTS)


@pytest.mark.slow
def test_all_are_detected_on_a_hybrid_mixture(tmp_path: Path) -> None:
    folder = write_tiny("qwen3_5_moe", tmp_path / "model", seed=5, overrides=SMALL)
    assert all(fault.fits(load_model_config(str(folder))) for fault in FAULTS)
    request = Request(folder, tmp_path / "stage", "qwen3_5_moe", seed=5, random=True)
    outcome = run_one(stage_named("sensitivity"), request, print)
    assert outcome.status == PASSED, outcome.reason
    detected = [figure for figure in outcome.figures if figure.name.startswith("undetected: ")]
    assert len(detected) == len(FAULTS)
    assert all(figure.where for figure in detected)
