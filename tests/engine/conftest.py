"""One process that is a whole trainer: most engine tests need Megatron's groups of size one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def groups() -> None:
    from lockstep.config.megatron import Parallel
    from lockstep.engine.parallel import device

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
