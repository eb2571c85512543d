"""One rank of a trainer that sends its weights: `lockstep.engine.parallel.launch 2 sender_ranks.py JOB.json`.

Ten random steps; after each, rank 0 scores the tokens on the server. Writes the scores and what the last sync reported.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from lockstep.engine.export.adapters import AdaptersOut
from lockstep.engine.export.merged_weights import WeightsOut
from lockstep.engine.optim.trainable import assign
from lockstep.engine.parallel import device
from lockstep.engine.parallel.coordination import Agreement
from lockstep.engine.state import open_trainer
from lockstep.engine.weight_sync.sender import Endpoint
from lockstep.engine.weight_sync.sender_group import StoreSenderGroup
from lockstep.inference.client import Server
from lockstep.trainer.protocol import EngineConfig, from_json, to_json

SCALE = 2.0
RANK = 4


def noise(name: str, shape, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 100_003 + sum(ord(c) * (i + 1) for i, c in enumerate(name)))
    return torch.randn(*shape, generator=generator)


def changed(weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """All weights after a random step."""
    return {
        name: weight + 0.1 * weight.std().nan_to_num(0.1) * noise(name, weight.shape, seed)
        for name, weight in weights.items()
    }


def adapter(modules: dict[str, tuple[int, int]], seed: int) -> dict[str, torch.Tensor]:
    """Random pairs, by canonical names. modules: output and input features."""
    pairs = {}
    for name, (rows, columns) in modules.items():
        pairs[f"{name}.lora_A"] = 0.1 * noise(f"{name}.A", (RANK, columns), seed)
        pairs[f"{name}.lora_B"] = 0.1 * noise(f"{name}.B", (rows, RANK), seed)
    return pairs


def merged(weights: dict[str, torch.Tensor], pairs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = dict(weights)
    for name, b in pairs.items():
        if name.endswith(".lora_B"):
            module = name.removesuffix(".lora_B")
            tensors[f"{module}.weight"] = weights[f"{module}.weight"] + SCALE * b @ pairs[f"{module}.lora_A"]
    return tensors


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    settings = from_json(EngineConfig, job["settings"], "the job")
    device.start(settings.parallel, 0)
    agreement = Agreement()
    trainer = open_trainer(settings)
    senders = StoreSenderGroup(agreement.store, agreement.rank, agreement.world)
    out = AdaptersOut(trainer, senders, 200.0) if job.get("adapter") else WeightsOut(trainer, senders)
    base = {}
    for path in Path(settings.model).glob("*.safetensors"):
        base |= load_file(path)
    modules = {site.module: (site.out_features, site.in_features) for site in trainer.sites}
    server = Server(None, int(job["port"]), job["api_key"], "")  # pyright: ignore[reportArgumentType]
    scores, report = [], None
    for step in range(1, job["steps"] + 1):
        assign(trainer.trainables, changed(base, step) if settings.lora is None else adapter(modules, step))
        endpoint = Endpoint(server.root_url, server.api_key)
        report = out.push(endpoint, f"ranks@{step}", "gloo", 200.0)
        if agreement.rank == 0:
            scores.append(asyncio.run(server.score(f"ranks@{step}", job["tokens"])))
    sizes = [plan.nbytes for plan in out.plan.senders]
    if agreement.rank == 0:
        Path(job["answer"]).write_text(json.dumps({"scores": scores, "report": to_json(report), "sizes": sizes}))
    torch.distributed.barrier()  # rank 0 holds the store that the ranks meet in: it leaves when the other is done


if __name__ == "__main__":
    main()
