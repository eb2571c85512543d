"""The trainer's part of `adapter_sync.py`: a random adapter of a shape, sent from memory and loaded from a folder, again and again.

    python adapter_sender.py JOB.json

No Megatron: which matrices a trainer of one rank holds, and in which form it sends them, follow from the weight contract and the
trainer's own code; their values are random. Each round ends with the first token under the new adapter.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import torch

from lockstep.engine.export.adapters import BUCKET_BYTES, adapter_source
from lockstep.engine.layers.lora import ExpertAdapter, LocalAdapter
from lockstep.engine.optim.trainable import Trainable, adapter_parts, describe_adapter
from lockstep.engine.weight_sync.plan import plan_sources
from lockstep.engine.weight_sync.sender import AdapterPusher, Endpoint
from lockstep.engine.weight_sync.transports import make_transport
from lockstep.inference.vllm_args import adapter_fields
from lockstep.models.checkpoint.peft import AdapterInfo, adapter_config, write_adapter
from lockstep.models.contract import Layout, Sizes
from lockstep.models.registry import get_model_support_handler, load_model_config


class Adapter:
    """What a trainer of one rank holds. `matrices`: by the trainer's names, on the device; `sources`: how they travel."""

    def __init__(self, job: dict[str, Any], device: torch.device) -> None:
        self.config, self.layout = load_model_config(job["model"]), Layout()
        self.info = AdapterInfo(job["model"], job["rank"], 2.0 * job["rank"], tuple(job["targets"]))
        dtype, generator = getattr(torch, job["dtype"]), torch.Generator(device).manual_seed(1)
        self.trainables = list(self._trainables(get_model_support_handler(job["model"]), dtype))
        self.sources = [adapter_source(trainable, self.config, self.layout, dtype) for trainable in self.trainables]
        self.matrices = {
            trainable.name: torch.randn(
                trainable.parameter.shape, dtype=dtype, device=device, generator=generator
            ).mul_(0.02)
            for trainable in self.trainables
        }

    def _trainables(self, handler: Any, dtype: torch.dtype) -> Any:
        """The trainer's parameters, of shape and without bytes."""
        rank, scale = self.info.rank, self.info.scale
        for shard in handler.shards(self.config, self.layout, Sizes(), range(self.config.layers)):
            sites = [site for site in shard.sites if site.target in self.info.targets]
            if not sites:
                continue
            weight, parts = torch.empty(shard.shape, dtype=dtype, device="meta"), adapter_parts(sites)
            if shard.domain == "expert_tensor":
                adapter: Any = ExpertAdapter(weight, parts, rank, scale)
            else:
                base: Any = SimpleNamespace(weight=weight)
                adapter = LocalAdapter(base, parts, rank, scale)
            yield from describe_adapter(shard.megatron, adapter, sites, split_rows=False, rank=rank)

    def write(self, folder: Path) -> Path:
        """The same adapter as a PEFT folder, in the form that vLLM loads for the family."""
        tensors: dict[str, torch.Tensor] = {}
        for trainable in self.trainables:
            tensors |= _canonical(trainable, self.matrices[trainable.name].cpu())
        return write_adapter(folder, tensors, self.info, self.config, self.layout)


def _canonical(trainable: Trainable, values: torch.Tensor) -> dict[str, torch.Tensor]:
    names = list(dict.fromkeys(piece.name for piece in trainable.pieces if piece.name is not None))
    return dict(zip(names, [values] if values.dim() == 2 else values.unbind(), strict=True))


class Traffic(threading.Thread):
    """Streams from the base model while rounds are made, and notes when each token came."""

    def __init__(self, client: httpx.Client, tokens: int) -> None:
        super().__init__(daemon=True)
        self.client, self.tokens = client, tokens
        self.streams: list[list[float]] = []
        self.ended = threading.Event()

    def run(self) -> None:
        body = completion("bench", self.tokens)
        while not self.ended.is_set():
            self.streams.append([])
            with self.client.stream("POST", "/v1/completions", json=body) as reply:
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        self.streams[-1].append(time.monotonic())
                    if self.ended.is_set():
                        break

    def close(self) -> float:
        """The usual seconds from token to token."""
        self.ended.set()
        self.join(60.0)
        return statistics.median(after - before for stream in self.streams for before, after in self._steps(stream))

    def gap(self, started: float, ended: float) -> float | None:
        """The longest time between two tokens of a stream that overlaps these moments; None where none was under way throughout."""
        for stream in list(self.streams):
            if stream and stream[0] < started and stream[-1] > ended:
                return max(
                    after - before for before, after in self._steps(stream) if after > started and before < ended
                )
        return None

    @staticmethod
    def _steps(times: list[float]) -> list[tuple[float, float]]:
        return list(itertools.pairwise(times))


def completion(model: str, tokens: int) -> dict[str, Any]:
    """A streaming request for that many tokens after a prompt of two (one is too few for some models on a CPU)."""
    body = {"model": model, "prompt": [5, 6], "max_tokens": tokens, "stream": True, "ignore_eos": True}
    return body | {"temperature": 1.0, "detokenize": False}


def first_token(client: httpx.Client, model: str) -> None:
    """Returns when the first token under `model` has come."""
    with client.stream("POST", "/v1/completions", json=completion(model, 1)) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"no token under {model}: {reply.read().decode()}")
        lines = reply.iter_lines()
        first = json.loads(next(line for line in lines if line.startswith("data: {")).removeprefix("data: "))
        assert first.get("model") == model, first
        for _ in lines:  # the connection is used again
            pass


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    reply = client.post(path, json=body)
    if reply.status_code != 200:
        raise RuntimeError(f"the server refused {path}: {reply.text}")


def rounds(job: dict[str, Any], client: httpx.Client, way: str, load: Callable[[str], Any], traffic: bool) -> Any:
    """Loads the adapter under one new name after another and takes each away again. Seconds of each, and the usual ones per token."""
    busy = Traffic(client, job["tokens"]) if traffic else None
    if busy is not None:
        busy.start()
        time.sleep(0.5)
    figures = []
    for number in range(job["warm_up"] + job["repeat"]):
        name = f"{way}@{number}{'b' if traffic else ''}"
        started = time.monotonic()
        report = load(name)
        loaded = time.monotonic()
        first_token(client, name)
        ended = time.monotonic()
        time.sleep(0.2)
        asked = time.monotonic()
        first_token(client, name)
        again = time.monotonic() - asked
        gap = busy.gap(started, loaded) if busy else None
        times = {"seconds": loaded - started, "first_token_s": ended - started, "again_s": again, "gap_s": gap}
        figures.append({**times, "report": report})
        post(client, "/v1/unload_lora_adapter", {"lora_name": name})
        post(client, "/lockstep/sync/forget_adapter", {"name": name})
    usual = busy.close() if busy else None
    return {"way": way, "traffic": traffic, "usual_gap_s": usual, "rounds": figures}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    device = torch.device("cpu") if job["gpu"] is None else torch.device("cuda", job["gpu"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    adapter = Adapter(job, device)
    plan = plan_sources(adapter.sources, BUCKET_BYTES[device.type == "cuda"])
    carrier, config = make_transport(job["transport"], job["deadline_s"]), adapter_config(adapter.info, adapter.config)
    endpoint = Endpoint(job["root_url"], job["api_key"])
    pusher = AdapterPusher(endpoint, carrier, plan, config, device=device, deadline_s=job["deadline_s"])
    folder = adapter.write(Path(job["folder"]))
    headers = {"Authorization": f"Bearer {job['api_key']}"}

    def from_folder(name: str) -> None:
        body = {"lora_name": name, "lora_path": str(folder), **adapter_fields(folder)}
        post(client, "/v1/load_lora_adapter", body)

    def from_memory(name: str) -> dict[str, Any]:
        return asdict(pusher.push(adapter.matrices.items(), name))

    with httpx.Client(base_url=job["root_url"], headers=headers, timeout=job["deadline_s"], trust_env=False) as client:
        figures = [
            rounds(job, client, way, load, traffic)
            for way, load in (("memory", from_memory), ("folder", from_folder))
            for traffic in (False, True)
        ]
    pusher.close()
    answer = {"cases": figures, "nbytes": plan.nbytes, "tensors": len(adapter.sources), "buckets": len(plan.buckets)}
    Path(job["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
