"""Each file of `lockstep_wire.transports` is a transport that a user may name."""

from __future__ import annotations

from typing import get_args

import pytest

from lockstep.config.megatron import WeightTransport, fitting_transports
from lockstep.engine.weight_sync.transports import make_transport
from lockstep.errors import ConfigError
from lockstep_wire.transports import transports
from lockstep_wire.transports.disk import DiskSender


def test_the_setting_names_every_transport_and_each_fits_somewhere():
    assert set(get_args(WeightTransport)) == set(transports())
    fitting = {
        name
        for device in ("cpu", "cuda")
        for colocated in (False, True)
        for name in fitting_transports(device, colocated)
    }
    assert fitting == set(transports())


def test_a_transport_is_made_by_its_name_and_place(tmp_path):
    sender = make_transport(f"disk:{tmp_path}", 1.0)
    assert isinstance(sender, DiskSender)
    assert sender.open(1)["folder"].startswith(str(tmp_path))
    sender.close()


@pytest.mark.parametrize(("name", "says"), [("tcp", "expected one of disk, gloo, ipc, nccl"), ("disk", "disk:FOLDER")])
def test_a_transport_that_can_not_be_made_is_named(name, says):
    with pytest.raises(ConfigError, match=says):
        make_transport(name, 1.0)
