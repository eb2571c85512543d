"""A packed tree gives the loss and every gradient of its flattened sequences, on the real engine, for every family."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import packing
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from drawing import seeds
from lockstep.engine.device import Parallelism
from lockstep.engine.session import Session

TOLERANCE = {"float64": 1e-9, "float32": 2e-5}
drawn = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


_open: dict[str, Session] = {}


def holds(found: dict[str, float], tolerance: float) -> None:
    assert found["loss"] <= tolerance, found
    assert found["gradient"] <= tolerance, found


@pytest.fixture(scope="module", params=list(packing.FAMILIES))
def family(request, groups, tmp_path_factory) -> str:
    """A family whose fp64 session is open (by name: a session would fill pages in a failure report)."""
    folder = tmp_path_factory.mktemp(request.param)
    _open[request.param] = packing.open_tiny(request.param, folder, "float64", lora=False, parallel=Parallelism())
    return request.param


@drawn
@given(seed=seeds, leaves=st.integers(2, 16), loss=st.sampled_from(list(packing.CONFIGS)), tight=st.booleans())
def test_all_weights_in_fp64(family, seed, leaves, loss, tight):
    assume(any(one.scored for one in packing.draw(seed, leaves, moe=False)[0]))
    found = packing.difference(_open[family], seed, leaves, packing.CONFIGS[loss], tight)
    holds(found, TOLERANCE["float64"])
    assert loss == "ppo" or found["size"] > 0  # PPO may have clipped every token


@pytest.mark.parametrize("name", list(packing.FAMILIES))
def test_adapters_in_fp32(name, groups, tmp_path):
    session = packing.open_tiny(name, tmp_path, "float32", lora=True, parallel=Parallelism())
    for seed, config in enumerate(packing.CONFIGS.values()):
        found = packing.difference(session, 50 + seed, leaves=8, config=config, tight=seed == 1)
        holds(found, TOLERANCE["float32"])
        assert found["tokens"] < found["unpacked"]
        assert found["size"] > 0


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("parallel", "dtype"), [({"tensor": 2, "sequence": True}, "float64"), ({"tensor": 2, "sequence": True}, "float32")]
)
def test_tensor_and_sequence_parallel(parallel, dtype, tmp_path):
    command = [*(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d")]
    command += [*("--rdzv-endpoint", "127.0.0.1:0", packing.__file__), str(tmp_path), json.dumps(parallel), dtype]
    tests = Path(__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests}:{tests / 'engine'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        for found in json.loads((tmp_path / f"result-{rank}.json").read_text()).values():
            holds(found, TOLERANCE[dtype])
