"""Memory of trainer and server over many steps of colocated mode: what each holds after each phase of a step, first and last, and growth.

    python benchmarks/colocated.py                                          # a tiny model on the CPU
    python benchmarks/colocated.py --shape qwen3-8b --mode merged           # one GPU, 50 steps
    python benchmarks/colocated.py --shape qwen3-8b --layers 12 --rank 8 --prompts 2 --tokens 8 --budget 280    # soon over
    python benchmarks/colocated.py --shape qwen3-30b-a3b --mode lora --output h200.json

Each step is a real one: rollouts from the server, sleep, train, offload, sync, wake, verification.
On a GPU `held` is what the process has of the device (allocator's reserve for the trainer, the
whole device's use for the server's line); on a CPU it is resident host memory, which is noisy, and
`storages` is exact. Growth counts from step 3: the first steps allocate what is kept.
"""

from __future__ import annotations

import argparse
import shutil
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from real_steps import conclude, keep_logs, measured, model_options, passed_s, rollouts, say
from tiny import tiny_option

import lockstep as ls
from lockstep.backends.megatron.run import Run
from lockstep.trainer.protocol import Memory

SETTLED = 3
"""The step that growth counts from."""
LIMITS = {"storages": 0, "trainer_held": 128 << 20, "device_used": 128 << 20}
"""Bytes that may be more at the last step than at the settled one: fragments of an allocator's, not what a step leaves behind."""
PHASES = {
    "sleep": "server asleep",
    "onload": "trainer here",
    "train_step": "trained",
    "offload": "trainer away",
    "wake": "server awake",
    "sync": "weights sent",
    "sync_adapter": "adapter sent",
}


@dataclass
class Watch:
    """Notes both sides' memory after each phase of each step."""

    run: Run
    rows: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0

    def attach(self) -> None:
        """Listen to the backend's calls of both programs."""
        serve, work = self.run.server.call, self.run.trainer.call

        async def called(method: str, path: str, body: Any = None, **options: Any) -> Any:
            started = time.perf_counter()
            reply = await serve(method, path, body, **options)
            await self.note(path.rsplit("/", 1)[-1], time.perf_counter() - started)
            return reply

        async def worked(request: Any, **options: Any) -> Any:
            started = time.perf_counter()
            reply = await work(request, **options)
            await self.note(request.verb, time.perf_counter() - started)
            return reply

        self.run.server.call, self.run.trainer.call = called, worked  # pyright: ignore[reportAttributeAccessIssue]

    async def note(self, phase: str, seconds: float) -> None:
        if phase not in PHASES:
            return
        trainer = await self.run.trainer.call(Memory(), deadline_s=60.0)
        server = await self.run.server.memory()
        number = sum(row["step"] == self.step and row["phase"] == phase for row in self.rows)
        total = trainer.device_total
        self.rows.append(
            {
                "step": self.step,
                "phase": phase,
                "turn": number,
                "seconds": seconds,
                "storages": trainer.device_storages,
                "host_copies": trainer.host_copies,
                "device_total": total,
                "trainer_held": trainer.reserved if total else trainer.resident,
                "device_used": total - trainer.device_free if total else sum(process["resident"] for process in server),
            }
        )


def table(rows: list[dict[str, Any]]) -> str:
    """Per phase: bytes at the settled and at the last step, in MiB, their difference, and the median seconds."""
    columns = {"storages": "trainer storages", "trainer_held": "trainer held", "device_used": "server / device"}
    header = f"{'after':22}" + "".join(f"{name:>34}" for name in columns.values()) + f"{'s':>8}"
    lines = [header, " " * 22 + f"{'first':>12}{'last':>11}{'growth':>11}" * len(columns)]
    last = max(row["step"] for row in rows)
    for phase, turn in dict.fromkeys((row["phase"], row["turn"]) for row in rows if row["step"] == last):
        here = settled(rows, phase, turn)
        line = f"{PHASES[phase] + (f' ({turn + 1})' if turn else ''):22}"
        for name in columns:
            first, end = here[0][name] / 2**20, here[-1][name] / 2**20
            line += f"{first:12.1f}{end:11.1f}{end - first:+11.1f}"
        seconds = sorted(row["seconds"] for row in here)
        lines.append(line + f"{seconds[len(seconds) // 2]:8.2f}")
    return "\n".join(lines)


def settled(rows: list[dict[str, Any]], phase: str, turn: int) -> list[dict[str, Any]]:
    """What was noted after a phase, from the step on that growth counts from."""
    return [row for row in rows if (row["phase"], row["turn"]) == (phase, turn) and row["step"] >= SETTLED]


def losses(rows: list[dict[str, Any]]) -> list[str]:
    """What grew. Judged where a side has just given its memory away or taken it back: in between an allocator's reserve varies with the
    rollouts. The host's resident memory, all there is to see on a CPU, comes and goes and is not judged.
    """
    values = []
    for phase, turn in dict.fromkeys((row["phase"], row["turn"]) for row in rows):
        here = settled(rows, phase, turn)
        if not here:
            continue
        on_device = phase in ("sleep", "offload", "wake") and here[0]["device_total"]
        for name, limit in LIMITS.items():
            grown = here[-1][name] - here[0][name]
            if grown > limit and (on_device or name == "storages"):
                values.append(f"{name} after {PHASES[phase]!r} grew by {grown / 2**20:.1f} MiB")
    return values


async def measure(options: argparse.Namespace, folder: Path, runs: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(what was noted, why it ended early)."""
    import torch

    place = (0,) if torch.cuda.is_available() else "cpu"
    backend = ls.MegatronBackend(
        path=runs,
        rollout_weights_mode=options.mode,
        placement=ls.Placement(trainer=place, inference=place),
        offload=not options.keep,
        enable_expert_replay=options.replay,
        server_args=options.server_arg,
    )
    backend.on_progress = say
    lora = None if options.full else ls.LoraConfig(rank=options.rank, alpha=2 * options.rank)
    model = ls.TrainableModel(name="shared", project="benchmark", base_model=str(folder), lora=lora)
    rows: list[dict[str, Any]] = []
    try:
        await model.register(backend)
        backend.on_progress = None
        watch = Watch(backend.run_info(model), rows)
        watch.attach()
        await cycles(options, model, backend, watch)
    except Exception as error:  # noqa: BLE001 (whatever it is, what was measured before is written)
        traceback.print_exc()
        return rows, [f"{type(error).__name__}: {error}"]
    finally:
        await backend.close()
        keep_logs(runs, options.logs)
    return rows, []


async def cycles(
    options: argparse.Namespace, model: ls.TrainableModel, backend: ls.MegatronBackend, watch: Watch
) -> None:
    """As many steps as were asked for, or as the budget has time for."""
    config = ls.TrainConfig(learning_rate=1e-6, max_mismatch=None)
    longest = 0.0
    for step in range(1, options.cycles + 1):
        # The first ones compile; a later one takes about as long as the longest of those since.
        if step > SETTLED and passed_s() + longest > options.budget:
            say(f"stopped after {step - 1} steps: the budget of {options.budget:g} s has no time for another")
            return
        began, watch.step = time.perf_counter(), step
        groups = await rollouts(model, options.prompts, options.tokens)
        result = await backend.train(model, groups, config)
        seconds = time.perf_counter() - began
        if step >= SETTLED:
            longest = max(longest, seconds)
        say(f"step {step}: {seconds:.2f} s, probe {result.metrics['probe']:.1e}")
        # Nothing here reads an older step again, and the disk has no room for fifty optimizer states.
        shutil.rmtree(backend.run_path(model) / "steps" / f"{step - 1:04d}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_options(parser, "qwen3")
    parser.add_argument("--mode", choices=["lora", "merged"], default="merged")
    parser.add_argument("--keep", action="store_true", help="no offload: the trainer's memory stays on the device")
    parser.add_argument(
        "--replay", action="store_true", help="replay routed experts: the verification takes two more turns"
    )
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds, from the program's start, for all steps")
    tiny_option(parser, cycles=4)
    options = parser.parse_args()
    if options.cycles < SETTLED:
        parser.error(f"--cycles must be at least {SETTLED}")
    return options


def main() -> None:
    options = parse()
    rows, faults = measured(options, measure)
    done = max((row["step"] for row in rows), default=0)
    if done >= SETTLED:
        print(table(rows))
    conclude(
        options,
        {"steps": done, "rows": rows},
        faults + losses(rows),
        f"{done} of {options.cycles} steps, no memory lost",
    )


if __name__ == "__main__":
    main()
