"""An exported step: what transformers and PEFT compute from the folder is what the trainer computes from the step."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_runs import FAMILIES, run_of
from adapters import ALPHA, RANK
from lockstep.cli.export.card import model_card
from lockstep.cli.export.check import compare, text_ids, transformers_logprobs
from lockstep.cli.export.choose import chosen_step
from lockstep.cli.export.merge import merge_adapter
from lockstep.cli.export.write import export_step
from lockstep.cli.score import Line, score
from lockstep.config.megatron import Parallel
from lockstep.errors import ConfigError, MismatchError, StoreError
from lockstep.runs.store import RunStore, read_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return run_of(tmp_path_factory.mktemp("runs"), "qwen3")


def by_transformers(run: Path, step: int, folder: Path):
    """A trainer's scores as far as a test needs them: transformers on the merged weights of the step itself."""
    identity, checkpoint = read_checkpoint(run, step)
    base = Path(identity["base_model"])
    merged = merge_adapter(base, checkpoint.adapter, folder / f"expected-{step}")

    async def logprobs(model: str, ids: list[int], adapter: Path | None, dtype: str) -> list[float]:
        return transformers_logprobs(merged, base, ids, dtype).tolist()

    return logprobs


def exported(run: Path, step: int, target: Path, merge: bool, logprobs) -> Path:
    identity, checkpoint = read_checkpoint(run, step)
    return export_step(
        checkpoint,
        identity,
        merge,
        target,
        lambda folder: compare(folder, checkpoint, identity, logprobs),
        lambda kind, differences: model_card("demo/run", step, identity, {"reward": 0.5}, kind, differences),
    ).folder


def test_both_kinds_are_complete_and_alike(run, tmp_path):
    """PEFT's own arithmetic on the adapter folder, and the merged weights, give the same; the base gives something else."""
    logprobs = by_transformers(run, 2, tmp_path)
    identity, checkpoint = read_checkpoint(run, 2)
    base = Path(identity["base_model"])
    adapter, merged = (exported(run, 2, tmp_path / str(merge), merge, logprobs) for merge in (False, True))
    ids = text_ids(base)
    scores = [transformers_logprobs(folder, base, ids, "float32") for folder in (adapter, merged, base)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
    assert np.abs(scores[0] - scores[2]).mean() > 0.05
    name = "adapter_model.safetensors"
    assert (adapter / name).read_bytes() == (checkpoint.adapter / name).read_bytes()
    for folder in (adapter, merged):
        assert {"tokenizer.json", "tokenizer_config.json", "README.md"} <= {file.name for file in folder.iterdir()}
        assert "# demo/run, step 2" in (folder / "README.md").read_text()
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["False", "True", "expected-2"]


def test_a_folder_that_computes_something_else_is_refused_and_gone(run, tmp_path):
    """The folder holds another step's weights; and one whose weights were changed on the way."""
    other = by_transformers(run, 3, tmp_path)
    with pytest.raises(MismatchError, match="differs from step 2 by"):
        exported(run, 2, tmp_path / "wrong", True, other)
    assert [path.name for path in tmp_path.iterdir()] == ["expected-3"]


def test_a_target_that_exists_is_kept(run, tmp_path):
    (tmp_path / "target").mkdir()
    with pytest.raises(ConfigError, match="exists: give a new folder"):
        exported(run, 2, tmp_path / "target", False, None)


PROGRAM = """
import signal, sys, time
from pathlib import Path
from lockstep.cli.export.write import export_step
from lockstep.runs.store import read_checkpoint
def check(folder):
    print("checking", flush=True)
    time.sleep(60)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C, and so would this
identity, checkpoint = read_checkpoint(Path(sys.argv[1]), 2)
export_step(checkpoint, identity, False, Path(sys.argv[2]), check, lambda *_: "")
"""


def interrupted(run: Path, target: Path, by: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, run, target], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout
        assert child.stdout.readline() == b"checking\n"
        child.send_signal(by)
        child.wait(20)


def test_an_interrupted_export_leaves_nothing(run, tmp_path):
    """Ctrl-C clears up; what a SIGKILL leaves goes with the next export, and is never under the target's name."""
    target = tmp_path / "exports" / "model"
    interrupted(run, target, signal.SIGINT)
    assert list(target.parent.iterdir()) == []
    interrupted(run, target, signal.SIGKILL)
    assert not target.exists()
    assert len(list(target.parent.iterdir())) == 1
    exported(run, 2, target, False, by_transformers(run, 2, tmp_path))
    assert list(target.parent.iterdir()) == [target]


def test_the_step_is_a_number_the_last_or_the_best(run, tmp_path):
    assert chosen_step(run, None) is None
    assert chosen_step(run, "1") == 1
    assert chosen_step(run, "best") == 2
    with pytest.raises(ConfigError, match="give a number or best"):
        chosen_step(run, "newest")
    store = RunStore(tmp_path, "demo", "empty")
    store.close()
    with pytest.raises(StoreError, match="greedy_reward"):
        chosen_step(store.path, "best")


def test_merged_weights_are_rounded_once(tmp_path):
    """bf16: each weight is the fp64 sum rounded to the nearest bf16, not the sum of rounded parts."""
    run = run_of(tmp_path, "qwen3", "bfloat16")
    identity, checkpoint = read_checkpoint(run, 1)
    base = Path(identity["base_model"])
    merged = load_file(merge_adapter(base, checkpoint.adapter, tmp_path / "merged") / "model.safetensors")
    before = load_file(base / "model.safetensors")
    pairs = load_file(checkpoint.adapter / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    a_RI, b_OR = (pairs[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    exact_OI = before[f"{name}.weight"].double() + ALPHA / RANK * b_OR @ a_RI
    assert merged[f"{name}.weight"].dtype == torch.bfloat16
    assert (merged[f"{name}.weight"] != exact_OI.bfloat16()).float().mean() < 1e-3  # fp32 sums next to a tie
    assert torch.equal(merged["model.norm.weight"], before["model.norm.weight"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("family", FAMILIES)
async def test_every_family_against_the_trainer(family, tmp_path):
    """The real trainer scores base and adapter; transformers scores what was exported. Planted fault: one value."""
    run = run_of(tmp_path, family)
    identity, checkpoint = read_checkpoint(run, 1)
    base = Path(identity["base_model"])
    line = Line(id="text", tokens=text_ids(base))
    adapter = checkpoint.adapter
    (scored,) = await score(str(base), [line], adapter=adapter, parallel=Parallel(), packed=False, dtype="float32")

    async def logprobs(*_: object) -> list[float]:
        return scored.logprobs

    def export(target: Path, merge: bool) -> Path:
        return exported(run, 1, target, merge, logprobs)

    for merge in (False, True):
        folder = await asyncio.to_thread(export, tmp_path / f"out-{merge}", merge)
        assert folder.is_dir()
    weights = load_file(tmp_path / "out-True" / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.input_layernorm.weight"))
    weights[name] = weights[name] * 1.02
    save_file(weights, tmp_path / "out-True" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError):
        await asyncio.to_thread(compare, tmp_path / "out-True", checkpoint, identity, logprobs)
