"""Memory of trainer and server over many steps of shared mode: what each holds after each phase of a step, first and last, and growth.

    python benchmarks/shared_mode.py                                          # a tiny model on the CPU
    python benchmarks/shared_mode.py --shape qwen3-8b --mode merged           # one GPU, 50 steps
    python benchmarks/shared_mode.py --shape qwen3-30b-a3b --mode lora --output h200.json

Each step is a real one: rollouts from the server, sleep, train, offload, sync, wake, proof. On a GPU `held` is what the process has of the
device (allocator's reserve for the trainer, the whole device's use for the server's line); on a CPU it is resident host memory, which is
noisy, and `storages` is exact. Growth counts from step 3: the first steps allocate what is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shapes import SHAPES, write_random

import lockstep as ls
from lockstep.backends.run import Run

SETTLED = 3
"""The step that growth counts from."""
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

        async def worked(verb: str, args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            reply = await work(verb, args, **options)
            await self.note(verb, time.perf_counter() - started)
            return reply

        self.run.server.call, self.run.trainer.call = called, worked  # pyright: ignore[reportAttributeAccessIssue]

    async def note(self, phase: str, seconds: float) -> None:
        if phase not in PHASES:
            return
        trainer = await self.run.trainer.call("memory", {}, deadline_s=60.0)
        server = await self.run.server.memory()
        number = sum(row["step"] == self.step and row["phase"] == phase for row in self.rows)
        total = trainer["device_total"]
        self.rows.append(
            {
                "step": self.step,
                "phase": phase,
                "turn": number,
                "seconds": seconds,
                "storages": trainer["device_storages"],
                "host_copies": trainer["host_copies"],
                "trainer_held": trainer["reserved"] if total else trainer["resident"],
                "device_used": total - trainer["device_free"] if total else sum(one["resident"] for one in server),
            }
        )


async def rollouts(model: ls.TrainableModel, prompts: int, tokens: int) -> list[ls.TrajectoryGroup]:
    """Groups of two replies to made-up prompts, one rewarded and one not."""
    client, name = model.openai_client(), model.inference_name()

    async def group(number: int) -> ls.TrajectoryGroup:
        messages = [{"role": "user", "content": f"Say something about the number {number}."}]
        reply = await client.chat.completions.create(
            model=name,
            messages=messages,  # pyright: ignore[reportArgumentType]
            n=2,
            max_tokens=tokens,
            extra_body={"ignore_eos": True},
        )
        pairs = enumerate(reply.choices)
        return ls.TrajectoryGroup(
            trajectories=[ls.Trajectory(messages_and_choices=[*messages, one], reward=float(at)) for at, one in pairs]
        )

    return list(await asyncio.gather(*(group(number) for number in range(prompts))))


def table(rows: list[dict[str, Any]]) -> str:
    """Per phase: bytes at the settled and at the last step, in MiB, their difference, and the median seconds."""
    columns = {"storages": "trainer storages", "trainer_held": "trainer held", "device_used": "server / device"}
    header = f"{'after':22}" + "".join(f"{name:>34}" for name in columns.values()) + f"{'s':>8}"
    lines = [header, " " * 22 + f"{'first':>12}{'last':>11}{'growth':>11}" * len(columns)]
    last = max(row["step"] for row in rows)
    for phase, turn in dict.fromkeys((row["phase"], row["turn"]) for row in rows if row["step"] == last):
        here = [row for row in rows if (row["phase"], row["turn"]) == (phase, turn) and row["step"] >= SETTLED]
        line = f"{PHASES[phase] + (' (2)' if turn else ''):22}"
        for name in columns:
            first, end = here[0][name] / 2**20, here[-1][name] / 2**20
            line += f"{first:12.1f}{end:11.1f}{end - first:+11.1f}"
        seconds = sorted(row["seconds"] for row in here)
        lines.append(line + f"{seconds[len(seconds) // 2]:8.2f}")
    return "\n".join(lines)


def checkpoint(options: argparse.Namespace, scratch: Path) -> Path:
    folder = options.model or scratch / "model"
    if (folder / "config.json").is_file():
        return folder
    if options.shape == "tiny":
        from lockstep.families.tiny import write_tiny

        return write_tiny(options.family, folder)
    from lockstep.families.tiny_tokenizer import save_tokenizer

    write_random(options.shape, folder)
    save_tokenizer(folder)
    return folder


async def measure(options: argparse.Namespace, folder: Path, runs: Path) -> list[dict[str, Any]]:
    import torch

    place = (0,) if torch.cuda.is_available() else "cpu"
    backend = ls.MegatronBackend(
        path=runs,
        rollout_weights_mode=options.mode,
        placement=ls.Placement(trainer=place, inference=place),
        offload=not options.keep,
        enable_expert_replay=options.replay,
    )
    lora = None if options.full else ls.LoraConfig(rank=16, alpha=32)
    model = ls.TrainableModel(name="shared", project="benchmark", base_model=str(folder), lora=lora)
    await model.register(backend)
    watch = Watch(backend._run(model))
    watch.attach()
    config = ls.TrainConfig(learning_rate=1e-6, max_mismatch=None)
    try:
        for step in range(1, options.cycles + 1):
            watch.step = step
            groups = await rollouts(model, options.prompts, options.tokens)
            result = await backend.train(model, groups, config)
            print(f"step {step}: probe {result.metrics['probe']:.1e}", flush=True)
    finally:
        await backend.close()
    return watch.rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="tiny")
    parser.add_argument("--family", default="qwen3", help="family of the tiny model")
    parser.add_argument("--model", type=Path, help="a checkpoint folder to use, or to write the random one to")
    parser.add_argument("--mode", choices=["lora", "merged"], default="merged")
    parser.add_argument("--full", action="store_true", help="train all weights (merged mode)")
    parser.add_argument("--keep", action="store_true", help="no offload: the trainer's memory stays on the device")
    parser.add_argument("--replay", action="store_true", help="replay expert routes: the proof takes two more turns")
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--output", type=Path, help="write every figure as JSON")
    options = parser.parse_args()
    if options.cycles < SETTLED:
        parser.error(f"--cycles must be at least {SETTLED}")
    return options


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint(options, Path(scratch))
        rows = asyncio.run(measure(options, folder, Path(scratch) / "runs"))
    print(table(rows))
    if options.output:
        options.output.write_text(json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, "rows": rows}))


if __name__ == "__main__":
    main()
