"""`lockstep validate` end to end on a dense model, and what its exit code and files follow from."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from rich.console import Console

from lockstep.errors import ConfigError
from lockstep.models.tiny.write import write_tiny
from lockstep.validate.report import table, write_json
from lockstep.validate.runner import validate_model
from lockstep.validate.stage import STAGES, Comparison, Report, check_names
from lockstep.validate.stages.train_inf_mismatch import ADVICE, COLUMNS, KL, prompt


def report(ok) -> Report:
    values = {"mean_abs": 0.02867, "kl": 3.3e-4, "mean_abs_pct": 0.6159, "largest": 0.6764, "top1": 0.958}
    values |= {"top20": 0.9781, "expert_choices_differ": 0.006584}
    comparisons = [
        Comparison("base", "server again", values),
        Comparison("adapter", "trainer, own choices", values, ok),
    ]
    advice = ADVICE["bfloat16"]
    return Report("train_inf_mismatch", "some/model", "bfloat16", COLUMNS, "KL <= 1e-3", comparisons, advice)


@pytest.mark.parametrize(("ok", "verdict"), [(True, "ok"), (False, "no"), (None, "")])
def test_one_line_outside_its_limit_fails_the_report(ok, verdict, tmp_path):
    made = report(ok)
    assert made.ok == (ok is not False)
    console = Console(width=80, record=True)
    console.print(table(made))
    text = console.export_text()
    line = next(line for line in text.splitlines() if "trainer, own choices" in line)
    for shown in ("0.0287", "3.3e-04", "0.616", "0.676", "0.958", "0.978", "0.00658"):
        assert shown in line
    assert line.split()[-1] == (verdict or "0.00658")
    assert ("outside: run again with --dtype float32" in text) == (ok is False)
    write_json([made], tmp_path / "new" / "report.json")
    (read,) = json.loads((tmp_path / "new" / "report.json").read_text())
    assert read["ok"] == made.ok
    assert read["comparisons"][1]["values"]["kl"] == 3.3e-4
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.json"]


def test_unknown_stages_are_named_before_anything_starts():
    with pytest.raises(ConfigError, match="did you mean train_inf_mismatch"):
        check_names(["train_inf_mismatc"])
    with pytest.raises(ConfigError, match="choose from train_inf_mismatch"):
        check_names([])
    check_names(list(STAGES))
    assert len({prompt(number) for number in range(32)}) == 32


@pytest.mark.server
@pytest.mark.parametrize("damage", [False, True], ids=["sound", "the server holds other weights"])
async def test_a_dense_model(runtime, tmp_path, damage, monkeypatch):
    """fp32: trainer and server agree on every token, for base and adapter. Planted fault: the trainer reads another checkpoint."""
    from lockstep.validate.stages import train_inf_mismatch as stage

    small = {"num_hidden_layers": 2, "hidden_size": 64}
    base = write_tiny("qwen3", tmp_path / "model", seed=random.randrange(1000), overrides=small)
    if damage:
        other = write_tiny("qwen3", tmp_path / "other", seed=1001, overrides=small)
        honest = stage.launch

        async def launch(config, *rest):
            return await honest(config.model_copy(update={"model": other}), *rest)

        monkeypatch.setattr(stage, "launch", launch)
    settings = {"seed": 3, "prompts": 5, "tokens": 12}
    output = tmp_path / "report.json"
    code = await validate_model(str(base), ["train_inf_mismatch"], output, settings, Console(quiet=True))
    (report,) = json.loads(output.read_text())
    assert code == (1 if damage else 0)
    comparisons = {(row["policy"], row["compared"]): row for row in report["comparisons"]}
    assert set(comparisons) == {
        (policy, what) for policy in ("base", "adapter") for what in ("server again", "trainer")
    }
    for (_, what), row in comparisons.items():
        values = row["values"]
        assert values["tokens"] == 5 * 12
        if what == "trainer":
            assert row["ok"] == (not damage)
            assert (values["top1"] == 1.0) == (not damage)
            assert (values["top20"] > 0.99) == (not damage)
            assert (values["kl"] > KL["float32"]) == damage
            assert "expert_choices_differ" not in values
        else:
            assert (values["top1"], row["ok"]) == (1.0, None)
            assert values["largest"] < 1e-5
    own = [comparisons[policy, "server again"]["values"]["mean_abs_pct"] for policy in ("base", "adapter")]
    assert np.all(np.array(own) < 0.01)
