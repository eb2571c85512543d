"""What expert replay costs: the trainer's step time, and the server's tokens per second, each with and without.

    python benchmarks/replay_cost.py --server-layers 24 --output benchmarks/results/h200_replay_cost.json   # one GPU
    python benchmarks/replay_cost.py --part trainer --output benchmarks/results/h200_replay_cost.json       # one half of it
    python benchmarks/replay_cost.py --tiny                                                                 # CPU, a few minutes

On a host without FlashInfer add `--server-arg=--gdn-prefill-backend --server-arg=triton`.

Server: two of them side by side on one GPU, one capturing routed experts; they take turns, while
the other one idles. A turn has two loads, each of so many requests at a time: `decoding`, where
none begins or ends in the window that counts, which shows what capture adds to a step, and
`stream`, where clients of different lengths ask one after the other, so that prompts are read and
routed experts handed over as well. Tokens are counted by the server's own counter. Both servers use
the same choices of Triton's autotuning (its cache on disk), where else each process would choose by
timings of its own. A window in which vLLM compiled a kernel, as it does for a shape it meets for
the first time, is measured again. `--server-shape` and `--server-layers` give the servers a model
of their own, with weights that vLLM makes up.

Trainer: one LoRA step of one packed batch, Qwen3.5-35B-A3B's shape; with replay it gets the very experts that its router chooses, so that
both ways do the same work.

Turns alternate, after one to warm up. The cost is the mean over pairs of turns, shown with its standard error; it fails (exit code 1) if
one is more than 1%. (On a CPU vLLM captures with another sampler, through an interpreter: those figures mean nothing.)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from replay import checkpoint, device, weights_option
from shapes import SHAPES
from sync_common import write_config

from lockstep.backends.megatron.plan.settings import routed_experts_shape
from lockstep.batching.packed_batch import PackedBatch
from lockstep.batching.routed_experts import RoutedExpertsShape, decode_routed_experts
from lockstep.inference.client import Server
from lockstep.inference.environment.install import find_runtime
from lockstep.inference.environment.locate import default_kind
from lockstep.inference.launch import LoraServing, ServerConfig, launch
from lockstep.models.registry import get_model_support_spec, load_model_config
from lockstep.models.tiny.write import write_tiny
from lockstep.testing.in_flight import counted, sampled_tokens
from packing import Case, batch_of, print_nothing

LIMIT = 0.01
RANK, ALPHA = 16, 32.0
WAYS = ("without", "with")
LOADS = ("decoding", "stream")
Turns = dict[str, list[float]]
"""A figure of each turn, by way."""
Note = Callable[[dict[str, Turns]], None]


class Served(NamedTuple):
    server: Server
    routed_experts: RoutedExpertsShape | None
    """Of what it captures."""


async def serve(folder: Path, run_dir: Path, capture: bool, options: argparse.Namespace) -> Served:
    cuda = default_kind() == "cuda"
    made_up = () if any(folder.glob("*.safetensors")) else ("--load-format", "dummy")
    config = ServerConfig(
        model=folder,
        served_name="base",
        dtype="bfloat16",
        lora=LoraServing(max_rank=RANK, targets=get_model_support_spec(str(folder)).default_target_modules),
        max_model_len=options.prompt + options.tokens * 3 // 2 + 1,
        max_num_seqs=options.requests,
        capture_routed_experts=capture,
        gpus=(0,) if cuda else (),
        gpu_memory_utilization=0.42,
        extra_args=(*made_up, "--jit-monitor-verbose", *options.server_arg),
        extra_env={"TRITON_CACHE_AUTOTUNING": "1"},
    )
    server = await launch(config, find_runtime(default_kind()), run_dir, lambda line: print(line, flush=True))
    return Served(server, routed_experts_shape(load_model_config(str(folder))) if capture else None)


async def client(served: Served, options: argparse.Namespace, random: np.random.Generator, decoding: bool) -> None:
    """One request after the other, of half to one and a half times the usual length: of the first one only a part, or (decoding) all of
    the longest. The routed experts of a reply are checked as the trainer checks them.
    """
    part = random.random()
    while True:
        prompt = random.integers(3, 300, options.prompt).tolist()
        tokens = 1 + int(part * random.integers(options.tokens // 2, options.tokens * 3 // 2))
        if decoding:
            tokens = options.tokens * 3 // 2
        body = {"model": "base", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        (choice,) = (await served.server.call("POST", "/v1/completions", body, deadline_s=900)).json()["choices"]
        if served.routed_experts:
            captured = choice["routed_experts"], choice["routed_experts_digest"]
            decode_routed_experts(
                *captured, choice["prompt_token_ids"], choice["token_ids"], served.routed_experts, "a reply"
            )
        part = 1.0


async def reading(server: Server) -> tuple[float, float]:
    """(the time in the middle of the question, tokens sampled so far)."""
    asked = time.perf_counter()
    tokens = await sampled_tokens(server)
    return (asked + time.perf_counter()) / 2, tokens


async def tokens_per_second(served: Served, options: argparse.Namespace, turn: int, decoding: bool) -> float:
    """Sampled tokens per second in the window, while as many requests as fit are always under way."""
    server = served.server
    clients = [
        asyncio.create_task(client(served, options, np.random.default_rng((turn, number)), decoding))
        for number in range(options.requests)
    ]
    try:
        await asyncio.wait(clients, timeout=options.ramp, return_when=asyncio.FIRST_EXCEPTION)
        ended = await counted(server, "request_success_total")
        start, before = await reading(server)
        window = options.window if decoding else options.stream_window
        await asyncio.wait(clients, timeout=window, return_when=asyncio.FIRST_EXCEPTION)
        stop, after = await reading(server)
        ended = await counted(server, "request_success_total") - ended
    finally:
        for user in clients:
            user.cancel()
        ends = await asyncio.gather(*clients, return_exceptions=True)
    for end in ends:
        if not isinstance(end, asyncio.CancelledError):
            raise RuntimeError("a client's request failed") from end
    if decoding and ended:
        raise RuntimeError(f"{ended:.0f} requests ended while all should decode: more --tokens or a shorter --window")
    while await counted(server, "num_requests_running"):
        await asyncio.sleep(0.05)
    return (after - before) / (stop - start)


def compilations(server: Server) -> int:
    """Kernels that the server has compiled or tuned since it began to answer: vLLM's monitor logs each."""
    assert server.child is not None
    lines = server.child.log_path.read_text(errors="replace").splitlines()
    return sum("compilation during inference" in line or "Triton autotuning for function" in line for line in lines)


async def undisturbed(served: Served, options: argparse.Namespace, turn: int, decoding: bool) -> float:
    """`tokens_per_second` of a window in which nothing was compiled: whichever server met the shape first would pay for it."""
    while True:
        before = compilations(served.server)
        rate = await tokens_per_second(served, options, turn, decoding)
        compiled = compilations(served.server) - before
        if not compiled:
            return rate
        print(f"turn {turn}: {rate:.0f} tokens/s with {compiled} kernels compiled: again", file=sys.stderr, flush=True)


def stolen_seconds() -> float:
    """Time that the host has kept this machine's processors waiting, all of them together, where Linux counts."""
    path = Path("/proc/stat")
    return int(path.read_text().split()[8]) / os.sysconf("SC_CLK_TCK") if path.exists() else 0.0


async def server_rates(folder: Path, scratch: Path, options: argparse.Namespace, note: Note) -> None:
    """Tokens per second of every turn, by load: `note` gets those there are after each."""
    servers: dict[str, Served] = {}
    rates: dict[str, Turns] = {load: {way: [] for way in WAYS} for load in LOADS}
    started = time.monotonic()
    try:
        for way in WAYS:
            servers[way] = await serve(folder, scratch / way, way == "with", options)
        for turn in range(options.repeat + 1):
            for load, way in product(LOADS, WAYS if turn % 2 else reversed(WAYS)):
                before = stolen_seconds()
                rate = await undisturbed(servers[way], options, turn, load == "decoding")
                stolen = f"{stolen_seconds() - before:.2f} s stolen"
                print(
                    f"turn {turn}: {load}, {way} capture: {rate:.0f} tokens/s ({stolen})", file=sys.stderr, flush=True
                )
                if turn:
                    rates[load][way].append(rate)
            if turn > 1:
                note(rates)
                if time.monotonic() - started > options.budget:
                    break
    finally:
        await asyncio.gather(*(part.server.close() for part in servers.values()))


def server_model(scratch: Path, options: argparse.Namespace) -> Path:
    """What is served: the trainer's model, or one of another depth without weights."""
    if not (options.server_layers or options.server_shape):
        folder = checkpoint(options, scratch)
    else:
        layers = {"num_hidden_layers": options.server_layers} if options.server_layers else {}
        if options.tiny:
            folder = write_tiny("qwen3_5_moe", scratch / "served", overrides=layers)
        else:
            folder = write_config(options.server_shape or "qwen3.5-35b-a3b", scratch / "served", layers)
    name_every_token(folder)
    return folder


def name_every_token(folder: Path) -> None:
    """A word for each token id that the tokenizer does not know. vLLM takes twice its usual time for an id without one."""
    from transformers import AutoConfig

    size = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"Ġw{number}": number for number in range(len(vocabulary), size)}
    path.write_text(json.dumps(tokenizer))


def open_engine(folder: Path) -> Any:
    """Our engine in this process, with adapters on the family's targets."""
    import socket

    from lockstep.config.megatron import Parallel
    from lockstep.engine.parallel import device as engine_device
    from lockstep.engine.state import open_trainer
    from lockstep.models.registry import default_target_modules_for_model
    from lockstep.trainer.protocol import EngineConfig, LoraSettings

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    os.environ.update({name: str(value) for name, value in settings.items()})
    engine_device.start(Parallel(), seed=0)
    lora = LoraSettings(RANK, ALPHA, tuple(default_target_modules_for_model(str(folder))))
    return open_trainer(EngineConfig(str(folder), Parallel(), "bfloat16", lora))


def own_routed_experts(trainer: Any, batch: PackedBatch) -> np.ndarray:
    """[R, S, L, K] experts that the model's own routers pick: what replay is given, so that the work stays the same."""
    from lockstep.engine.layers.moe import MoE
    from lockstep.engine.steps.score import score

    picked: list[list[np.ndarray]] = []
    hooks = []
    for layer in (module for module in trainer.model.modules() if isinstance(module, MoE)):
        recorded: list[np.ndarray] = []
        picked.append(recorded)

        def keep(_module: Any, _args: Any, out: Any, kept: list[np.ndarray] = recorded) -> None:
            kept.append(out[1].cpu().numpy())

        hooks.append(layer.router.register_forward_hook(keep))
    score(trainer, batch, print_nothing)
    for hook in hooks:
        hook.remove()
    shape = routed_experts_shape(trainer.config)
    assert shape is not None
    sizes = (*batch.tokens_RS.shape, shape.layers, shape.top_k)
    routed_experts = np.broadcast_to(np.arange(shape.top_k), sizes).astype(shape.dtype)
    for number, rows in enumerate(picked):
        for row, choices in enumerate(rows):
            size = min(len(choices), batch.row_length)
            routed_experts[row, :size, number] = choices[:size]
    return routed_experts


def trainer_seconds(folder: Path, options: argparse.Namespace) -> Turns:
    from lockstep.config.train import TrainConfig
    from lockstep.engine.steps.train_step import train_step

    trainer = open_engine(folder)
    batch = batch_of(Case("group", options.samples, 0.5, options.length), "packed", 300, None)
    batches = {"without": batch, "with": replace(batch, experts_RSLK=own_routed_experts(trainer, batch))}
    config = TrainConfig(max_mismatch=None, learning_rate=1e-9)
    seconds: Turns = {way: [] for way in WAYS}
    for turn in range(options.repeat + 1):
        for way in WAYS if turn % 2 else reversed(WAYS):
            start = time.perf_counter()
            train_step(trainer, batches[way], config, None, print_nothing)
            if turn:
                seconds[way].append(time.perf_counter() - start)
    return seconds


def cost(values: Turns, rate: bool) -> dict[str, float]:
    """What the second way costs as a share of the first, from pairs of turns."""
    pairs = zip(values["without"], values["with"], strict=True)
    shares = [(without / with_ if rate else with_ / without) - 1 for without, with_ in pairs]
    error = statistics.stdev(shares) / len(shares) ** 0.5
    return {"cost": statistics.mean(shares), "standard_error": error, "median": statistics.median(shares)}


def model_name(options: argparse.Namespace, served: bool) -> str:
    shape = (options.server_shape if served else None) or "qwen3.5-35b-a3b"
    layers = (options.server_layers if served else None) or options.layers
    return "tiny" if options.tiny else f"{shape}, {layers} layers"


@dataclass
class Figures:
    """What was measured; on disk as soon as it is known, since all of it takes minutes."""

    output: Path | None
    known: dict[str, Any] = field(default_factory=dict)

    def note(self, name: str, unit: str, values: Turns, rate: bool) -> None:
        self.known[name] = {"device": device(), "unit": unit} | cost(values, rate) | values
        if self.output:
            self.output.write_text(json.dumps(self.known, indent=1) + "\n")

    def show(self, names: list[str]) -> bool:
        """Print these; whether none of them costs too much."""
        width = max(map(len, names)) + 12
        print(f"{'':{width}}{'without':>12}{'with':>12}{'cost':>9}{'+-':>9}{'median':>9}")
        for name in names:
            window = self.known[name]
            medians = "".join(f"{statistics.median(window[way]):12.4g}" for way in WAYS)
            shown = "".join(f"{window[figure]:9.2%}" for figure in ("cost", "standard_error", "median"))
            print(f"{name + ', ' + window['unit']:{width}}{medians}{shown}")
        return all(self.known[name]["cost"] <= LIMIT for name in names)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that the program runs")
    parser.add_argument("--layers", type=int, default=8)
    weights_option(parser)
    parser.add_argument("--part", choices=["server", "trainer"], help="one alone; the other's figures in --output stay")
    parser.add_argument("--server-shape", choices=list(SHAPES), help="of the served model (qwen3.5-35b-a3b)")
    parser.add_argument("--server-layers", type=int, help="of the served model (the trainer's)")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for the servers, then no turn begins")
    parser.add_argument("--requests", type=int, help="sampled at a time (64; tiny: 2)")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt (512; tiny: 16)")
    parser.add_argument("--tokens", type=int, help="tokens sampled per request (2048; tiny: 640)")
    parser.add_argument("--ramp", type=float, help="seconds of a load before its window (2; tiny: 1)")
    parser.add_argument("--window", type=float, help="seconds of decoding that count (6; tiny: 2)")
    parser.add_argument(
        "--stream-window", type=float, help="of the stream, whose rate varies with what happens to begin (15; tiny: 2)"
    )
    parser.add_argument("--samples", type=int, default=4, help="sequences of the training batch, half of each shared")
    parser.add_argument("--length", type=int, help="their tokens (4096; tiny: 48)")
    parser.add_argument("--repeat", type=int, help="turns that count, each way (20; tiny: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="folder to write the random checkpoint to, or to use again")
    parser.add_argument("--server-arg", action="append", default=[], help="a further argument of vLLM's command line")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    sizes = {"requests": (2, 64), "prompt": (16, 512), "tokens": (640, 2048), "length": (48, 4096), "repeat": (2, 20)}
    for name, (small, large) in (sizes | {"ramp": (1, 2), "window": (2, 6), "stream_window": (2, 15)}).items():
        setattr(options, name, getattr(options, name) or (small if options.tiny else large))
    if options.repeat < 2:
        parser.error("--repeat: one pair of turns has no standard error, take 2 or more")
    return options


def main() -> None:
    options = parse()
    figures = Figures(options.output)
    if options.output and options.output.exists() and options.part:
        figures.known = json.loads(options.output.read_text())
    served, trained = model_name(options, served=True), f"training, {model_name(options, served=False)}"
    names: list[str] = []

    def note(rates: dict[str, Turns]) -> None:
        for load, values in rates.items():
            figures.note(f"{load}, {served}", "tokens/s", values, rate=True)

    with tempfile.TemporaryDirectory() as scratch:
        if options.part != "trainer":
            asyncio.run(server_rates(server_model(Path(scratch), options), Path(scratch), options, note))
            names += [f"{load}, {served}" for load in LOADS]
        if options.part != "server":
            seconds = trainer_seconds(checkpoint(options, Path(scratch)), options)
            figures.note(trained, "s per step", seconds, rate=False)
            names.append(trained)
    cheap = figures.show(names)
    sys.exit(0 if cheap or options.tiny else 1)


if __name__ == "__main__":
    main()
