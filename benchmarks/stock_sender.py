"""vLLM's own NCCL weight transfer, both sides vLLM's code: the measure that `weight_sync.py` compares with. Run by the server's Python.

    python stock_sender.py JOB.json

Names, dtypes and shapes are the checkpoint's; packed mode. Prints the seconds of each update as JSON: start, update and finish,
generation being paused all the while.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

import requests
import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine


class Client(HTTPVLLMWeightSyncClient):
    """vLLM's client, with the token that our server asks for."""

    token = ""

    def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
        headers = {"Authorization": f"Bearer {self.token}"}
        reply = requests.post(f"{self.base_url}/{path}", json=json, headers=headers, timeout=300)
        reply.raise_for_status()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def source_of(weights: dict[str, torch.Tensor]) -> Any:
    """The weights as vLLM's WeightSource: metadata once, tensors at each update."""

    class Held(WeightSource):
        def metadata(self) -> Any:
            return [ParamMeta(name=n, dtype=t.dtype, shape=tuple(t.shape)) for n, t in weights.items()]

        def __iter__(self) -> Any:
            return iter(weights.items())

    return Held()


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    device = torch.device("cuda", job["gpu"])
    torch.cuda.set_device(device)
    dtype = getattr(torch, job["dtype"])
    weights = {name: torch.randn(shape, dtype=dtype, device=device) * 0.02 for name, shape in job["shapes"].items()}
    Client.token = job["api_key"]
    client = Client(job["root_url"])
    info = NCCLTrainerInitInfo(
        master_address="127.0.0.1", master_port=free_port(), world_size=1 + job["workers"], packed=True, rank=0
    )
    engine = NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=source_of(weights))
    seconds = []
    for _ in range(job["warm_up"] + job["repeat"]):
        client._post("pause?mode=keep")
        torch.cuda.synchronize()
        started = time.perf_counter()
        engine.send_weights()  # the whole round: start, update, finish
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        client._post("resume")
    print("SECONDS " + json.dumps(seconds[job["warm_up"] :]))


if __name__ == "__main__":
    main()
