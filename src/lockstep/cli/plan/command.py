"""`lockstep plan`: the layouts as a table, with what they assume."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from lockstep.cli.plan.ceilings import DEVICES, USED_FLOPS
from lockstep.cli.plan.layouts import Asked, Layout, layouts
from lockstep.cli.plan.work import Model
from lockstep.config.lora import LoraConfig
from lockstep.errors import ConfigError
from lockstep.models.checkpoint.hub import described_folder
from lockstep.models.config import parse_config, read_json
from lockstep.models.registry import get_model_support_spec

_GIB = 2**30


def show_plan(
    model: str,
    gpus: int,
    context: int,
    sequences: int,
    mode: str,
    network: float | None,
    device: str,
    scale: bool,
    console: Console,
) -> None:
    """Print the layouts of `gpus` GPUs; with `scale`, the fastest of each power of two up to them.

    network: GB/s between hosts.

    Raises ConfigError for what was never measured, and where nothing fits.
    """
    if device not in DEVICES:
        raise ConfigError(
            f"--device {device}: only {', '.join(DEVICES)} was measured, and a plan of another would be a guess"
        )
    if mode not in ("lora", "merged"):
        raise ConfigError(f"--mode {mode}: it is lora or merged")
    if min(context, sequences) < 1:
        raise ConfigError("--context and --sequences: give at least 1")
    base = described_folder(model)
    spec = get_model_support_spec(str(base))
    config = parse_config(read_json(base), spec, source=f"{model}: config.json")
    if context > config.max_positions:
        raise ConfigError(f"--context {context} is more than the model's {config.max_positions} positions")
    rank = LoraConfig().rank
    sizes = Model.of(config, spec, rank)
    asked = Asked(gpus, context, sequences, mode == "merged", network and network * 1e9, DEVICES[device])
    rows = _scaled(sizes, asked) if scale else [(gpus, layout) for layout in layouts(sizes, asked)]
    console.print(_table(rows))
    for line in _assumptions(sizes, asked, rank, rows):
        console.print(f"* {line}", markup=False, highlight=False, soft_wrap=True)


def _scaled(model: Model, asked: Asked) -> list[tuple[int, Layout]]:
    """The fastest layout of each power of two; where no time is known, the one with most servers."""
    rows, gpus = [], 2
    while gpus <= asked.gpus:
        try:
            made = layouts(model, replace(asked, gpus=gpus))
            rows.append((gpus, min(made, key=lambda layout: (layout.step_s is None, layout.step_s or 0.0))))
        except ConfigError:
            if gpus * 2 > asked.gpus and not rows:
                raise
        gpus *= 2
    return rows


def _table(rows: list[tuple[int, Layout]]) -> Table:
    table = Table(box=None, pad_edge=False)
    names = (
        "GPUs",
        "trainer",
        "TP",
        "PP",
        "DP",
        "EP",
        "GiB",
        "recomputed",
        "servers",
        "cache tokens",
        "step s",
        "sync s",
    )
    for name in names:
        table.add_column(name, justify="right")
    for gpus, layout in rows:
        ranks = layout.ranks
        table.add_row(
            str(gpus),
            str(ranks.gpus),
            *map(str, (ranks.tensor, ranks.pipeline, ranks.data, ranks.expert)),
            f"{layout.memory.peak / _GIB:.0f}",
            str(layout.memory.recomputed),
            f"{layout.servers} x {layout.server_gpus}",
            f"{layout.cache_tokens:,}",
            "unknown" if layout.step_s is None else f"{layout.step_s:.3g}",
            f"{layout.sync_s:.2g}",
        )
    return table


def _assumptions(model: Model, asked: Asked, rank: int, rows: list[tuple[int, Layout]]) -> list[str]:
    device = asked.device
    lines = [
        f"{device.name}, {device.memory / _GIB:.0f} GiB; {USED_FLOPS:.0%} of {device.flops / 1e12:.0f} TFLOP/s are used; "
        f"{device.link / 1e9:.0f} GB/s between GPUs of a host, no work hides a transfer",
        f"{model.parameters / 1e9:.1f} billion parameters in bf16, {model.active / 1e9:.1f} active, LoRA rank {rank} on the family's "
        f"layers ({model.adapter / 1e6:.0f} million)",
        f"a step trains {asked.sequences} sequences of {asked.context} tokens with no shared prefix, one to a row; rollouts are not in it",
        f"a sync sends {'the merged weights' if asked.merged else 'the adapter'} to one server after another; verification is not in it",
        "TP, PP, DP, EP: tensor, pipeline, data and expert parallel ranks of the trainer; servers: how many x GPUs of each",
        "measured were one and two GPUs; layouts of more are computed from these",
    ]
    if any(layout.step_s is None for _, layout in rows):
        lines.append(
            "step time unknown: nothing like it was measured (mixtures of experts, linear attention, and layers too small to fill "
            "the GPU)"
        )
    if asked.network is not None:
        lines.append(
            f"{asked.network / 1e9:g} GB/s between hosts, as given. A run of Lockstep is on one host today: rows of more than "
            f"{device.per_host} GPUs are an outlook"
        )
    return lines
