"""Verification right in both directions: many correct syncs in a row, none refused; then faults planted in the server, all refused.

    python benchmarks/verification.py --tiny                                   # a tiny model on the CPU, bf16, a few minutes
    python benchmarks/verification.py --model SMOLLM2 --output lora.json       # 200 syncs of adapters of a real model
    python benchmarks/verification.py --model SMOLLM2 --mode merged
    python benchmarks/verification.py --shape qwen3-8b --syncs 200             # random weights

A sync is a training step and all that follows: adapter or merged weights into the server, the live
memory read back, the probe scored on both sides. Rollouts are made anew every `--fresh` steps, and
trained on again until then. Then, at each of three learning rates, one step with each fault in the
server's memory (`tests/support/server/planted.py`): the adapter of the step before, one stale
matrix, or (merged) one tensor left at the step before. The program fails (exit code 1) if a correct
sync is refused or a fault is not.

`power` is how far a step moved the policy on the probe, in units of the noise between the two programs: below 1, behaviour alone can't
tell the step from the one before, and digests do.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from real_steps import conclude, keep_logs, measured, model_options, rollouts, say

import lockstep as ls
from lockstep.backends.megatron import backend as megatron
from lockstep.backends.megatron import publish, recovery
from lockstep.errors import LockstepError, MismatchError
from lockstep.inference.environment.install import find_runtime
from lockstep.testing.faults import EXTENSION, Plot

RATES = (1e-6, 1e-5, 1e-4)
FIGURES = (
    "probe",
    "probe_p99",
    "verification_power",
    "top1_overlap",
    "top20_overlap",
    "seconds_verify",
    "seconds_sync",
    "verified_identity",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_options(parser, "llama3")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and 12 syncs")
    parser.add_argument("--mode", choices=["lora", "merged"], default="lora")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--syncs", type=int, default=200, help="correct syncs in a row")
    parser.add_argument("--fresh", type=int, default=10, help="steps between new rollouts")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    options = parser.parse_args()
    if options.tiny:
        options.syncs = min(options.syncs, 12)
    report, faults = measured(options, measure)
    conclude(options, report, faults, "every correct sync was verified, and every planted fault refused")


async def measure(options: argparse.Namespace, folder: Path, runs: Path) -> tuple[dict[str, Any], list[str]]:
    with tempfile.TemporaryDirectory() as scratch:
        plots: list[Plot] = []

        def planted_runtime(kind: str) -> Any:
            if not plots:
                plots.append(Plot(find_runtime(kind), Path(scratch) / "plugin"))
            return plots[0].runtime

        megatron.find_runtime = recovery.find_runtime = planted_runtime
        lora = None if options.full else ls.LoraConfig(rank=options.rank, alpha=2 * options.rank)
        backend = ls.MegatronBackend(
            path=runs,
            rollout_weights_mode="merged" if options.full else options.mode,
            dtype=options.dtype,
            tool_call_parser="hermes",
            server_args=(*EXTENSION, *options.server_arg),
        )
        model = ls.TrainableModel(name="verified", project="bench", base_model=str(folder), lora=lora)
        try:
            await model.register(backend)
            noise = backend.run_info(model).noise
            say(f"registered; noise on the base weights: {noise}")
            report, refused = await correct(options, backend, model)
            report["noise"] = vars(noise)
            report["planted"], missed = await planted(options, backend, model, plots[0])
            return report, refused + missed
        finally:
            await backend.close()
            keep_logs(runs, options.logs)


async def correct(options: argparse.Namespace, backend: Any, model: Any) -> tuple[dict[str, Any], list[str]]:
    """`--syncs` steps, none with a fault: (the figures of all, what was refused)."""
    rows: list[dict[str, float]] = []
    config = ls.TrainConfig(learning_rate=options.learning_rate, max_steps_off_policy=options.fresh)
    groups: list[Any] = []
    started = time.monotonic()
    for number in range(options.syncs):
        if number % options.fresh == 0:
            groups = await rollouts(model, options.prompts, options.tokens)
        try:
            result = await backend.train(model, groups, config)
        except LockstepError as error:
            return {"syncs": rows}, [f"sync {number + 1} of {options.syncs} was refused: {error}"]
        rows.append({name: result.metrics[name] for name in FIGURES})
        if number % 10 == 0:
            say(f"sync {number + 1}: " + ", ".join(f"{name} {rows[-1][name]:.3g}" for name in FIGURES))
    say(f"{len(rows)} correct syncs in {time.monotonic() - started:.0f} s, none refused")
    print(f"{'':20s} {'median':>10s} {'largest':>10s}")
    for name in FIGURES:
        values = [row[name] for row in rows]
        print(f"{name:20s} {statistics.median(values):10.3g} {max(values):10.3g}")
    unread = sum(row["verified_identity"] < 1 for row in rows)
    return {"syncs": rows}, [f"{unread} syncs could not be read back"] if unread else []


async def planted(
    options: argparse.Namespace, backend: Any, model: Any, plot: Plot
) -> tuple[list[dict[str, Any]], list[str]]:
    """One step for each fault and learning rate: (what became of it, the faults that nobody refused)."""
    report, missed = [], []
    merged = options.full or options.mode == "merged"
    for rate in RATES:
        for fault in faults_of(merged):
            groups = await rollouts(model, options.prompts, options.tokens)
            step = model.step
            with plot.planted(**fault):
                said = await refusal(backend, model, groups, rate)
            what = ", ".join(fault.values())
            say(f"learning rate {rate:g}, {what}: {said or 'NOT REFUSED'}")
            report.append({"learning_rate": rate, "fault": what, "refused": said})
            missed += [] if said else [f"{what} at learning rate {rate:g} was not refused"]
            if model.step == step and step + 1 in backend.run_info(model).store.published():
                # A right sync of the step that was trained and published: the run goes on.
                await publish.serve(backend.run_info(model), step + 1)
                model._advance(step + 1)
    return report, missed


def faults_of(merged: bool) -> list[dict[str, str]]:
    layer = "model.layers.0"
    if merged:
        return [{"weight": f"{layer}.self_attn.o_proj.weight"}]
    name = f"base_model.model.{layer}.self_attn.q_proj"
    return [
        {"kind": "adapter of the step before"},
        *({"kind": "stale matrix", "name": f"{name}.lora_{side}.weight"} for side in "AB"),
    ]


async def refusal(backend: Any, model: Any, groups: list[Any], rate: float) -> str:
    """Who refused a step whose sync goes wrong; "" if nobody did. A merged server that was ended is a new one when `train` returns."""
    try:
        result = await backend.train(model, groups, ls.TrainConfig(learning_rate=rate))
    except MismatchError as error:
        return re.sub(r"\s+", " ", str(error))[:300]
    return "the server was ended and replaced" if result.metrics.get("server_restarts") else ""


if __name__ == "__main__":
    main()
