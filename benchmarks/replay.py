"""What expert replay does to the mismatch between server and trainer: the same rollouts scored with replay on and off.

    python benchmarks/replay.py --output benchmarks/results/h200_replay.json      # one GPU, Qwen3.5-35B-A3B's shape, 8 layers
    python benchmarks/replay.py --tiny                                            # CPU, a minute or two

On a host without FlashInfer add `--server-arg=--gdn-prefill-backend --server-arg=triton`. Random weights, scaled so that
routing is not flat and choices matter, a random adapter on all of the family's targets, bf16. vLLM samples, scores its own
samples again, and ends; then the trainer scores them on the recorded experts and on its own. It fails (exit code 1) unless
replay brings the adapter's KL to a quarter or less, and to at most 0.001 nats per token. With replay no pick that is used
differs from the recorded one: the engine accounts for every record and raises an error otherwise; `own router` is the
share that it would have picked differently.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import tempfile
from pathlib import Path

from shapes import DECIDED, ROUTED, write_random

from lockstep.inference.environment.locate import default_kind
from lockstep.models.tiny.tokenizer import save_tokenizer
from lockstep.models.tiny.write import write_tiny
from lockstep.validate.figures import Outcome
from lockstep.validate.request import Request
from lockstep.validate.stages.server.train_inf_mismatch import run

GAINS = {"routed": ROUTED, "decided": DECIDED}
SHARE, KL = 0.25, 1e-3
"""Limits: KL with replay over KL without, and KL with replay in nats per token."""


def checkpoint(options: argparse.Namespace, scratch: Path) -> Path:
    """The random model; a tokenizer beside it, since the prompts are text."""
    folder = options.model or scratch / "model"
    if options.tiny:
        return folder if (folder / "config.json").is_file() else write_tiny("qwen3_5_moe", folder, seed=options.seed)
    write_random("qwen3.5-35b-a3b", folder, {"num_hidden_layers": options.layers}, GAINS[options.weights])
    save_tokenizer(folder)
    return folder


def weights_option(parser: argparse.ArgumentParser) -> None:
    what = "how the random model is scaled (shapes.py): a pick that flips matters (routed), or hardly does (decided)"
    parser.add_argument("--weights", choices=list(GAINS), default="routed", help=what)


WAYS = ("server again", "trainer, replay", "trainer, own choices")


def values_of(outcome: Outcome, policy: str, way: str) -> dict[str, float]:
    """The figures of one comparison, by their short names."""
    label = f"{policy}, {way}: "
    figures = {f.name.removeprefix(label): f for f in outcome.figures if f.name.startswith(label)}
    values = {name: figure.value for name, figure in figures.items()}
    return values | {"mean": figures["|difference|"].mean, "largest": figures["|difference|"].largest}


def table(outcome: Outcome) -> str:
    lines = [
        f"{'':28}{'KL':>11}{'mean |dlogp|':>14}{'largest':>10}{'top-1':>8}{'top-20':>8}{'choices diff.':>14}{'own router':>12}"
    ]
    for policy in ("base", "adapter"):
        for way in WAYS:
            v = values_of(outcome, policy, way)
            top1, top20 = (1 - v[f"most likely {n} that differ"] for n in (1, 20))
            cells = f"{v['KL']:11.2e}{v['mean']:14.5f}{v['largest']:10.4f}{top1:8.4f}{top20:8.4f}"
            replayed = "expert choices that differ" in v
            cells += f"{'0' if replayed else '-':>14}" + (
                f"{v['expert choices that differ']:12.4%}" if replayed else f"{'-':>12}"
            )
            lines.append(f"{policy + ': ' + way:28}{cells}")
    return "\n".join(lines)


def verdict(outcome: Outcome) -> dict[str, float | bool]:
    on, off = (values_of(outcome, "adapter", way)["KL"] for way in WAYS[1:])
    share = on / off if off else 0.0
    return {"kl_on": on, "kl_off": off, "share": share, "ok": share <= SHARE and on <= KL}


def device() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {platform.machine()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that the program runs")
    parser.add_argument("--layers", type=int, default=8)
    weights_option(parser)
    parser.add_argument("--prompts", type=int, help="sequences per policy (32; tiny: 4)")
    parser.add_argument("--tokens", type=int, help="tokens sampled per sequence (512; tiny: 12)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="folder to write the random checkpoint to, or to use again")
    parser.add_argument("--server-arg", action="append", default=[], help="a further argument of vLLM's command line")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        request = Request(
            checkpoint(options, Path(scratch)),
            Path(scratch) / "stage",
            "qwen3_5_moe",
            default_kind(),
            seed=options.seed,
            prompts=options.prompts or (4 if options.tiny else 32),
            tokens=options.tokens or (12 if options.tiny else 512),
            dtype="bfloat16",
            server_args=tuple(options.server_arg),
        )
        outcome = asyncio.run(run(request))
    judged = verdict(outcome)
    print(table(outcome))
    print(f"KL with replay: {judged['kl_on']:.2e}, {judged['share']:.3f} of that without (limits {KL:g} and {SHARE})")
    if options.output:
        shape = "tiny" if options.tiny else f"qwen3.5-35b-a3b, {options.layers} layers, {options.weights}"
        details = outcome.as_json() | {"base_model": "random weights"}
        figures = {"device": device(), "shape": shape, "verdict": judged, "report": details}
        options.output.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(0 if judged["ok"] or options.tiny else 1)


if __name__ == "__main__":
    main()
