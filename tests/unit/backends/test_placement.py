"""Where trainer and server go, how weights travel between them there, and what a server that shares a GPU may take of it."""

from __future__ import annotations

import pytest

import lockstep as ls
from lockstep.backends.megatron.launch import memory_share
from lockstep.backends.megatron.plan import placement
from lockstep.backends.megatron.plan.placement import Devices, check_processes, resolve_placement, resolve_transport
from lockstep.errors import ConfigError
from lockstep.process.child import visible_gpus


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """A machine with as many GPUs as asked for."""

    def made(count):
        for number in range(count):
            (tmp_path / f"nvidia{number}").touch()
        (tmp_path / "nvidiactl").touch()
        monkeypatch.setattr(placement, "Path", lambda name: tmp_path if name == "/dev" else None)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return made


@pytest.mark.parametrize(
    ("count", "asked", "expected"),
    [
        (0, None, Devices()),
        (1, None, Devices((0,), (0,), colocated=True)),
        (2, None, Devices((0,), (1,))),
        (4, None, Devices((0,), (1,))),
        (4, ([0, 1], [1, 0]), Devices((1, 0), (1, 0), colocated=True)),
        (4, ([0, 1], [2]), Devices((0, 1), (2,))),
        (4, ([0], [[1], [2, 3]]), Devices((0,), (1, 2, 3), split=((1,), (2, 3)))),
        (4, ([0], [[2, 3]]), Devices((0,), (2, 3))),
        (4, ("cpu", "cpu"), Devices(colocated=True)),
    ],
)
def test_devices(gpus, count, asked, expected):
    gpus(count)
    given = None if asked is None else ls.Placement(trainer=asked[0], inference=asked[1])
    assert resolve_placement(given) == expected
    assert expected.kind == ("cpu" if not expected.inference else "cuda")


@pytest.mark.parametrize(
    ("count", "asked", "replicas", "servers"),
    [
        (0, None, 2, ((), ())),
        (0, None, 1, ((),)),
        (4, None, 3, ((1,), (2,), (3,))),
        (8, ([0], [4, 5, 6, 7]), 2, ((4, 5), (6, 7))),
        (8, ([0], [[1], [2]]), 2, ((1,), (2,))),
    ],
)
def test_each_replica_has_devices_of_its_own(gpus, count, asked, replicas, servers):
    gpus(count)
    given = None if asked is None else ls.Placement(trainer=asked[0], inference=asked[1])
    devices = resolve_placement(given, replicas)
    assert devices.servers == servers
    assert devices.kind == ("cuda" if count else "cpu")
    assert not devices.colocated


@pytest.mark.parametrize(
    ("count", "asked", "replicas", "why"),
    [
        (2, None, 2, "use replicas = 1"),
        (8, ([0], [1, 2, 3]), 2, "does not fit placement.inference"),
        (8, ([0], [[1], [2]]), 3, "does not fit placement.inference"),
        (8, ([0, 1], [0, 1]), 2, "share devices"),
        (0, ("cpu", "cpu"), 2, "share devices"),
    ],
)
def test_replicas_that_make_no_sense(gpus, count, asked, replicas, why):
    gpus(count)
    given = None if asked is None else ls.Placement(trainer=asked[0], inference=asked[1])
    with pytest.raises(ConfigError, match=why):
        resolve_placement(given, replicas)


@pytest.mark.parametrize(
    ("inference", "why"),
    [([[0], [1]], "several servers need GPUs of their own"), ([[1], [1]], "each once"), ([[1], []], "at least one")],
)
def test_servers_that_make_no_sense(inference, why):
    with pytest.raises(ConfigError, match=why):
        ls.Placement(trainer=[0], inference=inference)


def test_gpus_that_are_not_there(gpus):
    gpus(0)
    with pytest.raises(ConfigError, match="this machine has none"):
        resolve_placement(ls.Placement(trainer=[0], inference=[0]))
    gpus(2)
    with pytest.raises(ConfigError, match="names GPU 2, this machine has 2"):
        resolve_placement(ls.Placement(trainer=[0], inference=[2]))


def test_only_visible_gpus_are_used(gpus, monkeypatch):
    """What a scheduler left to this process: its third GPU and one it names by UUID."""
    gpus(8)
    assert visible_gpus((1, 0)) == "1,0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5ebe9f43,-1,2")
    assert resolve_placement(None) == Devices((0,), (1,))
    assert visible_gpus((1, 0)) == "GPU-5ebe9f43,3"
    with pytest.raises(ConfigError, match="names GPU 2, CUDA_VISIBLE_DEVICES leaves 2"):
        resolve_placement(ls.Placement(trainer=[0], inference=[2]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert resolve_placement(None) == Devices()
    assert visible_gpus(()) == ""


@pytest.mark.parametrize(("gpus", "parallel"), [((0, 1), ls.Parallel()), ((0,), ls.Parallel(data=2, pipeline=2))])
def test_a_trainer_process_has_a_gpu_and_every_gpu_a_process(gpus, parallel):
    with pytest.raises(ConfigError, match=f"{len(gpus)} GPU.* and {parallel.processes} process"):
        check_processes(Devices(gpus, (7,)), parallel)
    check_processes(Devices(tuple(range(parallel.processes)), (7,)), parallel)
    check_processes(Devices(), parallel)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"numerics": "exakt"}, "numerics = 'exakt': input should be 'fast' or 'exact'"),
        ({"dtype": "float16"}, "dtype = 'float16'"),
        ({"weight_transport": "tcp"}, "weight_transport = 'tcp'"),
        ({"rollout_weights_mode": "loar"}, "rollout_weights_mode = 'loar'"),
        ({"max_model_len": 16}, "max_model_len = 16: input should be greater than or equal to 49"),
        ({"seed": -1}, "seed = -1: input should be greater than or equal to 0"),
    ],
)
def test_backend_settings_that_do_not_exist(settings, says):
    with pytest.raises(ConfigError, match=says):
        ls.MegatronBackend(**settings)


@pytest.mark.parametrize(
    ("trainer", "inference", "says"),
    [
        ([0, 1], [1], "share GPU 1 but not all"),
        ("cpu", [0], "'cpu' for one"),
        ([], [0], "at least one"),
        ("gpu", "gpu", ""),
    ],
)
def test_placements_that_make_no_sense(trainer, inference, says):
    with pytest.raises(ConfigError, match=says):
        ls.Placement(trainer=trainer, inference=inference)


def test_transport_follows_the_devices():
    fitting = {Devices(): "gloo", Devices((0,), (1,)): "nccl", Devices((0,), (0,), colocated=True): "ipc"}
    for devices, name in fitting.items():
        assert resolve_transport(None, devices) == resolve_transport(name, devices) == name
        assert resolve_transport("disk", devices) == "disk"
        other = next(transport for transport in fitting.values() if transport != name)
        with pytest.raises(ConfigError, match=f"here it is '{name}' or 'disk'"):
            resolve_transport(other, devices)


def test_a_server_takes_most_of_what_is_free():
    assert memory_share(0, 0) == 0.9
    assert memory_share(140 << 30, 141 << 30) == 0.89
    assert memory_share(70 << 30, 140 << 30) == 0.45
    for free in range(0, 16 << 30, 1 << 30):
        with pytest.raises(ConfigError, match="too little"):
            memory_share(free, 144 << 30)
