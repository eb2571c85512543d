"""Real training steps with requests in flight: the alias moves from @0 to @N, what is being served goes on, and every step is verified.

    python benchmarks/merged_steps.py                                                      # a tiny mixture on the CPU
    python benchmarks/merged_steps.py --shape qwen3-30b-a3b --layers 8 --server-arg=--enforce-eager --output h200.json
    python benchmarks/merged_steps.py --mode lora --shape qwen3-8b                         # adapters from the trainer's memory

With two GPUs the trainer has GPU 0 and the server GPU 1. A step: rollouts; several clients ask
under the current name, one long request after another, until the step is over; `train` (pack, step,
publish, sync, verification). It fails (exit code 1, one line for each reason) unless

* the server answers to the step's own name after it, as what its weights are (merged) or beside the others (lora), and no longer to names
  that nobody keeps;
* every request that was in flight ended with all of its tokens, and says which version made which of them: the one it asked for, or
  (merged) also the next; and at least one was being sampled when the weights changed;
* server and trainer agree: the verification after the sync, and the rollouts' own log-probabilities within `--max-mismatch`.

GB/s is the sync's bytes over its transfer (plan, receive and digests; the swap is the pause).
"""

from __future__ import annotations

import argparse
import asyncio
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from real_steps import conclude, keep_logs, measured, model_options, rollouts, say
from tiny import tiny_option

import lockstep as ls
from lockstep.backends.megatron.run import Run
from lockstep.errors import ServerError
from lockstep.rollouts.leases import rollout_scope
from lockstep.testing.in_flight import sampled_tokens, seen_sampling

PROBE = list(range(3, 40))


@dataclass(frozen=True)
class Answer:
    """One request of a client in flight. spans: which version made which tokens."""

    asked: str
    tokens: int
    wanted: int
    spans: list[dict[str, Any]]
    began: float
    ended: float

    @property
    def versions(self) -> list[str]:
        return [span["version"] for span in self.spans]

    def fault(self, allowed: list[str]) -> str | None:
        """What is wrong with it; None if nothing is. allowed: versions that may have made its tokens, in the order they came."""
        if self.tokens != self.wanted:
            return f"{self.tokens} of {self.wanted} tokens"
        ends = [0, *(span["end"] for span in self.spans)]
        if [span["start"] for span in self.spans] != ends[:-1] or ends[-1] != self.tokens:
            return f"its spans don't cover its {self.tokens} tokens: {self.spans}"
        if self.versions != [version for version in allowed if version in self.versions]:
            return f"made by {self.versions}, allowed are {allowed}"
        return None


@dataclass
class Syncs:
    """Listens to the trainer's syncs: what each reported, and when it began and ended."""

    reports: list[dict[str, Any]] = field(default_factory=list)

    def attach(self, run: Run) -> None:
        work = run.trainer.call

        async def worked(request: Any, **options: Any) -> Any:
            began = time.monotonic()
            reply = await work(request, **options)
            if request.verb in ("sync", "sync_adapter"):
                self.reports.append({**asdict(reply), "began": began, "ended": time.monotonic()})
            return reply

        run.trainer.call = worked  # pyright: ignore[reportAttributeAccessIssue]


class InFlight:
    """Clients that ask one long request after another under the version they began with, until `over`."""

    def __init__(self, model: ls.TrainableModel, count: int, tokens: int) -> None:
        self.model, self.over = model, asyncio.Event()
        # Of different lengths, so that they don't all end just before the weights change.
        lengths = [max(1, tokens - number * tokens // (2 * count)) for number in range(count)]
        self.tasks = [asyncio.create_task(self._ask(length)) for length in lengths]

    async def _ask(self, tokens: int) -> list[Answer]:
        answers: list[Answer] = []
        client = self.model.openai_client().with_options(max_retries=0)  # one that is lost is to be seen
        with rollout_scope():  # holds the version
            while not self.over.is_set():
                name, began = self.model.inference_name(), time.monotonic()
                reply = await client.chat.completions.create(
                    model=name,
                    messages=[{"role": "user", "content": "Go on and on."}],
                    max_tokens=tokens,
                    extra_body={"ignore_eos": True},
                )
                extra = reply.choices[0].model_extra or {}
                ids, spans = extra["token_ids"], extra["weight_versions"]
                answers.append(Answer(name, len(ids), tokens, spans, began, time.monotonic()))
        return answers

    async def ended(self) -> tuple[list[Answer], list[str]]:
        """(every request that was answered, the clients' errors), when the last one is."""
        self.over.set()
        ended = await asyncio.gather(*self.tasks, return_exceptions=True)
        lost = [f"a request in flight was lost: {outcome!r}" for outcome in ended if isinstance(outcome, BaseException)]
        return [answer for answers in ended if not isinstance(answers, BaseException) for answer in answers], lost

    async def cancelled(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def alias_faults(run: Run, merged: bool) -> list[str]:
    """What is wrong with the names that the server answers to, now that `train` returned and no rollout runs."""
    step, faults = run.model.step, []
    name, version, names = run.name(step), await run.server.version(), await run.server.models()
    served = version["version"] if merged else name
    if served != name or name not in names or (merged and names[0] != name):
        faults.append(f"after step {step} the server holds {version['version']} and answers to {names}, not to {name}")
    for older in range(step):
        old = run.name(older)
        if older == step - 1:  # kept for rollouts that began under it
            _, choice = await run.server.score_choice(old, PROBE)
            made = [span["version"] for span in choice["weight_versions"]]
            if made != [name if merged else old]:
                faults.append(f"{old} was answered by {made}")
        elif not await _refused(run, old):
            faults.append(f"{old} is still answered after step {step}, and nobody keeps it")
    if not await _refused(run, run.name(step + 1)):
        faults.append(f"{run.name(step + 1)} is answered before there is such a step")
    return faults


async def _refused(run: Run, name: str) -> bool:
    try:
        await run.server.score(name, PROBE)
    except ServerError as error:
        return name in str(error)
    return False


def flight_faults(answers: list[Answer], sync: dict[str, Any], allowed: list[str]) -> tuple[list[str], int]:
    """(what is wrong with the requests in flight, how many lived through the change of weights)."""
    faults = [f"a request under {answer.asked}: {fault}" for answer in answers if (fault := answer.fault(allowed))]
    # With adapters a request keeps its own, however many are loaded meanwhile; merged weights change under it.
    through = [
        answer
        for answer in answers
        if (
            len(answer.spans) > 1 if len(allowed) > 1 else answer.began < sync["began"] and answer.ended > sync["ended"]
        )
    ]
    if not through:
        faults.append(f"none of {len(answers)} requests was being sampled when the weights changed")
    return faults, len(through)


async def one_step(
    options: argparse.Namespace, model: ls.TrainableModel, backend: ls.MegatronBackend, syncs: Syncs
) -> dict[str, Any]:
    run, step, merged = backend.run_info(model), model.step, options.mode == "merged"
    groups = await rollouts(model, options.prompts, options.tokens)
    sampled = await sampled_tokens(run.server)
    flight = InFlight(model, options.in_flight, options.long)
    try:
        await seen_sampling(run.server, sampled, options.in_flight)
        say(f"step {step + 1}: {options.in_flight} requests are in flight")
        began = time.monotonic()
        config = ls.TrainConfig(learning_rate=options.learning_rate, max_mismatch=options.max_mismatch)
        metrics = (await backend.train(model, groups, config)).metrics
        seconds = time.monotonic() - began
        answers, lost = await flight.ended()
    finally:
        await flight.cancelled()
    sync = syncs.reports[-1]
    allowed = [run.name(step), run.name(step + 1)] if merged else [run.name(step)]
    faults, through = flight_faults(answers, sync, allowed)
    faults += lost + await alias_faults(run, merged)
    row = {
        "step": model.step,
        "alias": f"@{step} -> @{model.step}",
        "probe": metrics["probe"],
        "mismatch": metrics["mismatch"],
        "bytes": metrics["sync_bytes"],
        "transfer_s": metrics["seconds_sync_transfer"],
        "gb_per_s": metrics["sync_bytes"] / metrics["seconds_sync_transfer"] / 1e9,
        "pause_s": metrics["seconds_sync_pause"],
        "how": f"{sync['policy']}, {sync['path']}",
        "train_s": metrics["seconds_train"],
        "sync_s": metrics["seconds_sync"],
        "step_s": seconds,
        "requests": len(answers),
        "through": through,
    }
    say(f"step {model.step}: {seconds:.1f} s, probe {row['probe']:.1e}, {through} requests lived through the sync")
    return row | {"faults": faults, "metrics": metrics, "answers": [asdict(answer) for answer in answers]}


COLUMNS = {
    **{"alias": "alias", "probe": "probe", "mismatch": "mismatch", "gb": "GB", "transfer_s": "transfer s"},
    **{"gb_per_s": "GB/s", "pause_s": "pause s", "how": "how", "train_s": "train s", "sync_s": "sync s"},
    **{"step_s": "step s", "requests": "in flight", "through": "through the sync"},
}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = [row[name] if name != "gb" else row["bytes"] / 1e9 for name in COLUMNS]
        lines.append(
            "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
        )
    return "\n".join(lines)


def start(options: argparse.Namespace, folder: Path, runs: Path) -> tuple[ls.TrainableModel, ls.MegatronBackend]:
    import torch

    gpus = torch.cuda.device_count()
    place, server_args = None, list(options.server_arg)
    if gpus > 1:
        place = ls.Placement(trainer=[0], inference=[1])
        # Room for a second copy of the weights, which are received while the server goes on.
        server_args = ["--gpu-memory-utilization", str(options.gpu_memory_utilization), *server_args]
    elif gpus == 1:
        raise SystemExit("needs two GPUs, or none: for one that both share see colocated.py")
    backend = ls.MegatronBackend(
        path=runs,
        rollout_weights_mode=options.mode,
        placement=place,
        max_model_len=options.max_model_len,
        server_args=server_args,
    )
    backend.on_progress = say
    lora = None if options.full else ls.LoraConfig(rank=options.rank, alpha=2 * options.rank)
    return ls.TrainableModel(name="steps", project="benchmark", base_model=str(folder), lora=lora), backend


async def measure(options: argparse.Namespace, folder: Path, runs: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(a row for each step that was done, what was wrong)."""
    rows: list[dict[str, Any]] = []
    model, backend = start(options, folder, runs)
    try:
        async with asyncio.timeout(options.deadline):
            await model.register(backend)
            run, syncs = backend.run_info(model), Syncs()
            syncs.attach(run)
            faults = await alias_faults(run, options.mode == "merged")
            say(f"the server answers to {await run.server.models()}")
            for _ in range(options.steps):
                rows.append(await one_step(options, model, backend, syncs))
                faults += rows[-1]["faults"]
    except Exception as error:  # noqa: BLE001 (whatever it is, what was measured before is written)
        traceback.print_exc()
        why = str(error) or f"{options.deadline:g} s are over"
        return rows, [f"{type(error).__name__} after {len(rows)} steps: {why}"]
    finally:
        await backend.close()
        keep_logs(runs, options.logs)
    return rows, faults


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_options(parser, "qwen3_moe")
    parser.add_argument("--mode", choices=["lora", "merged"], default="merged")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--in-flight", type=int, default=8, help="clients that ask while a step is made")
    parser.add_argument("--long", type=int, help="tokens of their longest requests (1500; tiny: 120)")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-mismatch", type=float, default=0.1, help="mean, in nats per token")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.5, help="the server's share of its GPU")
    parser.add_argument("--deadline", type=float, default=540.0, help="seconds after which it gives up")
    tiny_option(parser, steps=1, in_flight=2)
    options = parser.parse_args()
    options.long = options.long or (120 if options.shape == "tiny" else 1500)
    return options


def main() -> None:
    options = parse()
    rows, faults = measured(options, measure)
    print(table(rows))
    done = f"{options.steps} steps: the alias moved from @0 to @{options.steps}, every request in flight ended"
    conclude(options, {"steps": rows}, faults, done)


if __name__ == "__main__":
    main()
