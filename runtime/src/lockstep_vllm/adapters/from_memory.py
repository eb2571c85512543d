"""Adapters that never touch a disk: staged in the worker, loaded by vLLM under a path `mem://...`.

vLLM 0.32 loads an adapter from a folder only. Its manager's `_load_adapter` is given a second
source here: tensors that a weight sync has staged. They stay staged as long as the adapter is
served, since vLLM loads it again after it fell out of its cache. A path is used once: vLLM keys its
prefix cache on an adapter's name and path.

Where this model's layers take an adapter by plain copies (`slot_writer.py`), vLLM's manager keeps
its books and the copies are made at once. Elsewhere the tensors go through vLLM's own loading and
filling.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import logging
import math
import re
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lockstep_vllm.adapters.slot_writer import SlotWriter
from lockstep_vllm.weight_sync.in_place_load import DirectUnavailableError
from lockstep_wire.plan import WirePlan, assemble

logger = logging.getLogger("vllm.lockstep")

SCHEME = "mem://"

_STACKED = re.compile(r"\.mlp\.experts\.(gate_proj|up_proj|down_proj|gate_up_proj)\.lora_[AB]\.weight$")
"""A layer's experts in one tensor; those of a PEFT file carry a number, or no projection's name."""


@dataclass(frozen=True, eq=False)
class Staged:
    """An adapter as it was received.

    config: the fields of adapter_config.json.
    slot_writer: None where only vLLM's own way is left.

    expected: the digests that its slot must have, from the bytes as they arrived; None where there
        is no slot writer.
    lora_ids: under which vLLM's manager loaded it, if it did.
    """

    config: dict[str, Any]
    plan: WirePlan
    buffers: Sequence[torch.Tensor]
    slot_writer: SlotWriter | None
    expected: list[str] | None
    lora_ids: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        _alive.add(self)


_alive: weakref.WeakSet[Any] = weakref.WeakSet()
staged: dict[str, Staged] = {}
"""By path."""


def nbytes() -> int:
    """Bytes of all adapters that are staged, or that vLLM's manager still keeps."""
    metas = (meta for adapter in _alive for meta in adapter.plan.metas.values())
    return sum(math.prod(meta.shape) * meta.dtype.itemsize for meta in metas)


def forget(path: str, manager: Any) -> None:
    """Frees a staged adapter that no request uses; harmless when there is none.

    manager: vLLM's WorkerLoRAManager.

    vLLM's manager would keep the adapter until the manager is full. Where experts are adapted, an
    adapter takes gigabytes of a GPU's memory.
    """
    adapter = staged.pop(path, None)
    for lora_id in adapter.lora_ids if adapter is not None else ():
        manager.remove_adapter(lora_id)


def refusal(path: str, lora_id: int, version: str, worker: int, manager: Any) -> tuple[str, bool]:
    """(The difference between a staged adapter's live slot and the sent bytes, "" for none; whether
    the comparison was possible.)

    lora_id: of the adapter that requests for `version` use.
    manager: vLLM's WorkerLoRAManager.
    """
    adapter, ids = staged[path], manager._adapter_manager.lora_index_to_id
    if lora_id not in adapter.lora_ids or lora_id not in ids:
        return f"worker {worker} has no slot with {version}: requests for it would use another adapter", True
    if adapter.slot_writer is None or adapter.expected is None:
        return "", False
    return adapter.slot_writer.refusal(ids.index(lora_id), adapter.expected, version, worker), True


def check_config(config: dict[str, Any], lora_config: Any) -> None:
    """Raises ValueError when this server can't serve an adapter of that kind: no LoRA at all, or
    too high a rank.
    """
    from vllm.lora.peft_helper import PEFTHelper

    if lora_config is None:
        raise ValueError("this server was started without room for adapters")
    PEFTHelper.from_dict(dict(config)).validate_legal(lora_config)


def apply() -> None:
    """Teaches vLLM's adapter manager, in this worker, the paths above. Does nothing the second
    time.
    """
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import WorkerLoRAManager

    original = WorkerLoRAManager._load_adapter
    if getattr(original, "lockstep", False):
        return
    merge, activate = LoRAModelManager._create_merged_loras_inplace, LoRAModelManager.activate_adapter

    def load_adapter(self, lora_request):
        if lora_request.lora_path.startswith(SCHEME):
            return _from_memory(self, lora_request)
        return original(self, lora_request)

    def merge_unless_planned(self, lora_model):
        if not hasattr(lora_model, "lockstep_staged"):
            merge(self, lora_model)

    def activate_adapter(self, lora_id):
        lora = self._registered_adapters.get(lora_id)
        if not hasattr(lora, "lockstep_staged") or lora_id in self._active_adapters:
            return activate(self, lora_id)
        return _activate(self, lora_id, lora.lockstep_staged, activate)

    load_adapter.lockstep = True  # type: ignore[attr-defined]
    WorkerLoRAManager._load_adapter = load_adapter
    LoRAModelManager._create_merged_loras_inplace = merge_unless_planned
    LoRAModelManager.activate_adapter = activate_adapter


def _activate(adapters: Any, lora_id: int, adapter: Staged, activate: Any) -> bool:
    """vLLM's own choice of a slot, with no layers to fill; then the planned copies."""
    assert adapter.slot_writer is not None
    modules, adapters.modules = adapters.modules, {}
    try:
        activated = activate(adapters, lora_id)
    finally:
        adapters.modules = modules
    adapter.slot_writer.fill(adapters.lora_index_to_id.index(lora_id), adapter.buffers)
    return activated


def make_slot_writer(manager: Any, config: dict[str, Any], plan: WirePlan) -> SlotWriter | None:
    """The copies of every adapter of this plan. None, with a line in the log, where this model's
    layers can't be filled by copies.

    manager: vLLM's WorkerLoRAManager.

    Raises ValueError for an adapter that this server can't serve at all.
    """
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_dict(dict(config))
    adapters = manager._adapter_manager
    if adapters.moe_ep_load_spec is not None:
        raise ValueError("adapters from memory are not served with expert parallelism: load them from a folder")
    _check_modules(adapters, plan.metas, _mapper(adapters.model))
    if helper.rank_pattern or helper.alpha_pattern:
        logger.info("no planned copies for adapters: their modules are scaled differently")
        return None
    scaling, helper.vllm_lora_scaling_factor = helper.vllm_lora_scaling_factor, 1.0

    def load(tensors: dict[str, torch.Tensor]) -> Any:
        lora = _lora_model(manager, helper, tensors, 1)
        adapters._create_merged_loras_inplace(lora)
        return lora

    try:
        return SlotWriter(adapters, plan, scaling, load)
    except DirectUnavailableError as error:
        logger.info("no planned copies for adapters: %s", error)
        return None


def _from_memory(manager: Any, lora_request: Any) -> Any:
    """Load an adapter as vLLM's own loader does, with the same checks. The tensors come from memory,
    not from a file, and stay on their device.
    """
    from vllm.lora.peft_helper import PEFTHelper

    adapter = staged[lora_request.lora_path]
    adapter.lora_ids.add(lora_request.lora_int_id)
    helper = PEFTHelper.from_dict(dict(adapter.config))
    helper.validate_legal(manager.lora_config)
    if adapter.slot_writer is not None:
        lora = manager._lora_model_cls(lora_request.lora_int_id, helper.r, {})
        lora.lockstep_staged = adapter
        return lora
    dtype = manager.lora_config.lora_dtype
    # vLLM multiplies B by alpha/r in place, and loads an adapter again when it fell out of its
    # cache: it gets a B of its own.
    tensors = {
        name: t.to(dtype, copy=name.endswith("lora_B.weight")) for name, t in assemble(adapter.plan, adapter.buffers)
    }
    lora = _lora_model(manager, helper, tensors, lora_request.lora_int_id)
    lora.is_3d_lora_weight = lora_request.is_3d_lora_weight
    manager._adapter_manager._validate_moe_lora_format(lora)
    return lora


def _lora_model(manager: Any, helper: Any, tensors: dict[str, torch.Tensor], lora_id: int) -> Any:
    """vLLM's form of an adapter, before its manager packs it."""
    adapters = manager._adapter_manager
    mapper = _mapper(adapters.model)
    given = dict(tensors)
    stacked = {name: given.pop(name) for name in list(given) if _STACKED.search(name)}
    lora = manager._lora_model_cls.from_lora_tensors(
        lora_model_id=lora_id,
        tensors=given,
        peft_helper=helper,
        device=str(next(iter(tensors.values())).device),
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=mapper,
        skip_prefixes=getattr(adapters.model, "lora_skip_prefixes", None),
    )
    _add_stacked(lora, stacked, helper, adapters, mapper)
    return lora


def _mapper(model: Any) -> Any:
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return None if mapper is None else mapper.get_rename_mapper()


def _add_stacked(lora: Any, stacked: dict[str, torch.Tensor], helper: Any, adapters: Any, mapper: Any) -> None:
    """Stacked experts, A [E, r, in] and B [E, out, r], as they are, in vLLM's packed form.

    One pair per expert, as in a file, would be 37,000 tensors for 48 layers of 128 experts, each
    with its own Python.
    """
    from vllm.lora.lora_weights import PackedLoRALayerWeights
    from vllm.lora.utils import parse_fine_tuned_lora_name

    layers: dict[str, dict[tuple[str, bool], torch.Tensor]] = {}
    for name, tensor in stacked.items():
        module, is_a = parse_fine_tuned_lora_name(name, mapper)
        owner, _, projection = module.rpartition(".")
        layers.setdefault(owner, {})[projection, is_a] = tensor
    for owner, given in layers.items():
        a, b = (_as_packed(adapters.modules[owner], owner, given, is_a) for is_a in (True, False))
        rank, scaling = helper.get_rank_and_scaling(owner)
        lora.loras[owner] = PackedLoRALayerWeights(
            owner, rank, [helper.lora_alpha] * len(a), a, b, scaling=[scaling] * len(a)
        )


def _as_packed(module: Any, owner: str, given: dict[tuple[str, bool], torch.Tensor], is_a: bool) -> list[torch.Tensor]:
    """The list for the layer's `set_lora`: gate, down, up; or gate-and-up and down, where gate and
    up are one matrix.

    vLLM's text-only class of Qwen3.5 keeps gate and up apart. Such a layer takes an adapter of the
    joint matrix as two adapters with the same A.
    """
    from vllm.lora.layers import FusedMoE3DWithLoRA

    fused, takes_fused = ("gate_up_proj", is_a) in given, isinstance(module, FusedMoE3DWithLoRA)
    wanted = ("gate_up_proj", "down_proj") if fused else ("gate_proj", "down_proj", "up_proj")
    missing = [number for number in wanted if (number, is_a) not in given]
    if missing or (takes_fused and not fused):
        raise ValueError(
            f"the adapter's experts of {owner!r} are {sorted({number for number, _ in given})}, "
            f"which this model's {type(module).__name__} can't take: load the adapter from a folder"
        )
    if fused and not takes_fused:
        both, down = given["gate_up_proj", is_a], given["down_proj", is_a]
        gate, up = (both, both) if is_a else both.chunk(2, dim=1)  # B [E, out, r], gate's rows first
        return [gate, down, up]
    return [given[number, is_a] for number in wanted]


def _check_modules(adapters: Any, names: Iterable[str], mapper: Any) -> None:
    """vLLM leaves out what it finds no module for, without a word: here that is an error."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    parts_of = adapters.packed_modules_mapping
    known: set[str] = set()
    for module in adapters.modules:
        owner, _, last = module.rpartition(".")
        known.update(f"{owner}.{part}" for part in (*parts_of.get(last, ()), last))
    for name in names:
        module, _ = parse_fine_tuned_lora_name(name, mapper)
        experts, stacked, _ = module.partition(".experts")
        if module not in known and not (stacked and f"{experts}.experts" in known):
            raise ValueError(f"the adapter has weights for {module!r}, which this model has no LoRA layer for")
