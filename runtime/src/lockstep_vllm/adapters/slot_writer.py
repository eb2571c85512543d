"""The positions of an adapter's bytes in vLLM's slots, planned once, so that a new adapter is a few
batched copies.

vLLM keeps room for some adapters in each layer and fills a slot layer by layer. Kernels of its own
set every matrix to zero, scale and copy it: thousands for a large model. Here vLLM's loading and
filling run once for each slot on meta tensors, and their copies are recorded (`in_place_load.py`).
From then on a slot is filled by repeating them. B is scaled in the slot, so what was received stays
as it was and can fill a slot again.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lockstep_vllm.weight_sync.identity import Identity, described
from lockstep_vllm.weight_sync.in_place_load import DirectPlan, make_plan
from lockstep_wire.plan import WirePlan

_ROOM = ("lora_{}_stacked",)
_EXPERTS_ROOM = ("w13_lora_{}_stacked", "w2_lora_{}_stacked")


@dataclass(frozen=True)
class _Slot:
    """The copies into one slot; the rest, which must be zero; all its Bs; and the switches that
    mark a layer as adapted.
    """

    copies: DirectPlan
    identity: Identity
    empty: list[torch.Tensor]
    scaled: list[torch.Tensor]
    switches: list[torch.Tensor]
    on: list[bool]

    def strays(self) -> int:
        """Elements that are not zero where nothing was copied to."""
        if not self.empty:
            return 0
        empty = {_address(tensor) for tensor in self.empty}
        copied = (p.target for pieces in self.copies.pieces for p in pieces if _address(p.target) in empty)
        return sum(map(_filled, self.empty)) - sum(map(_filled, copied))


class SlotWriter:
    """Valid as long as the layers' room lives where it did."""

    def __init__(
        self, manager: Any, plan: WirePlan, scaling: float, load: Callable[[dict[str, torch.Tensor]], Any]
    ) -> None:
        """manager: vLLM's LoRAModelManager.
        load: tensors by their shipped names to vLLM's LoRAModel, nothing scaled.

        Raises DirectUnavailableError where a matrix gets there otherwise than by copies.
        """
        self._scaling = scaling
        self._slots = [_slot(manager, plan, index, scaling, load) for index in range(manager.lora_slots)]

    @torch.no_grad()
    def fill(self, index: int, buffers: Sequence[torch.Tensor]) -> None:
        """Puts an adapter, received in these buffers, into a slot; on a GPU, queued on the current
        stream.
        """
        slot = self._slots[index]
        if slot.empty:
            torch._foreach_zero_(slot.empty)
        for number, bytes_N in enumerate(buffers):
            slot.copies.copy(number, bytes_N)
        if self._scaling != 1:
            torch._foreach_mul_(slot.scaled, self._scaling)
        for switch, on in zip(slot.switches, slot.on, strict=True):
            switch.fill_(on)

    def expected(self, buffers: Sequence[torch.Tensor]) -> list[str]:
        """The digests of what every slot that holds these buffers' adapter has to hold."""
        expected = self._slots[0].identity.expect()
        for number, bytes_N in enumerate(buffers):
            expected.add(number, bytes_N)
        return expected.read()

    @torch.no_grad()
    def refusal(self, index: int, expected: Sequence[str], version: str, worker: int) -> str:
        """The difference between a slot and `expected`; "" for none."""
        slot = self._slots[index]
        differences = slot.identity.differing(expected)
        if differences:
            return described(version, worker, differences)
        strays = slot.strays()
        if strays:
            return f"worker {worker} holds {strays} elements in {version}'s slot that belong to no weight of it"
        off = [i for i, (switch, on) in enumerate(zip(slot.switches, slot.on, strict=True)) if bool(switch) != on]
        return f"worker {worker} has {len(off)} layers of {version} switched the wrong way" if off else ""


def _slot(
    manager: Any, plan: WirePlan, index: int, scaling: float, load: Callable[[dict[str, torch.Tensor]], Any]
) -> _Slot:
    room: dict[str, torch.Tensor] = {}
    bs, switches = [], {}
    for name, module in manager.modules.items():
        fields = vars(module)
        kinds = _EXPERTS_ROOM if "w13_lora_a_stacked" in fields else _ROOM
        for side in ("a", "b"):
            for kind in kinds:
                for i, stacked in enumerate(fields[kind.format(side)]):
                    room[f"{name}.{kind.format(side)}.{i}"] = stacked
                    bs += [stacked[index]] if side == "b" else []
        if "adapter_enabled" in fields:
            switches[name] = fields["adapter_enabled"]
    adapted: set[str] = set()

    def fill(weights: Any) -> None:
        lora = load(dict(weights))
        for name, module in manager.modules.items():
            packed = manager._get_lora_layer_weights(lora, name)
            if packed:
                module.set_lora(index, packed.lora_a, packed.lora_b)
                adapted.add(name)

    # The switches, too, so that planning leaves them alone.
    live = room | {f"{name}.adapter_enabled": switch for name, switch in switches.items()}
    copies = make_plan(live, plan.metas, plan.buckets, fill, complete=False, keep_views=False)
    written = copies.written()
    empty = [room[name][index] for name in room if written.get(_address(room[name]), 0) != room[name][index].numel()]
    on = [name in adapted for name in switches]
    identity = Identity(copies, next(iter(room.values())).device, {_address(b) for b in bs}, scaling)
    return _Slot(copies, identity, empty, bs, [switch[index] for switch in switches.values()], on)


def _filled(tensor: torch.Tensor) -> int:
    return int(torch.count_nonzero(tensor))


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
