"""The worker's part of a weight sync: methods added to vLLM's worker class (`--worker-extension-cls`).

A sync has two halves. Buckets are received into staging memory by a thread of their own, while the engine goes on; then
`lockstep_sync_apply`, called while generation is paused, loads them. Until that call nothing live is touched.

Methods answer `{"error": kind, "message": text}` for what is the sender's to fix; an exception would be vLLM's end.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lockstep_vllm import coverage, memory_adapters
from lockstep_vllm.digest import digest
from lockstep_vllm.names import UnknownWeightError, resolve
from lockstep_vllm.transports import Transport, connect


@dataclass
class _Incoming:
    """What one receive has staged so far. Written by its thread; read once that has ended."""

    version: str
    thread: threading.Thread
    weights: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    waiting_for: str = ""
    failure: str = ""


@dataclass
class _State:
    transport: Transport | None = None
    plan: dict[str, Any] | None = None
    names: dict[str, str] = field(default_factory=dict)
    incoming: _Incoming | None = None


class Receiver:
    """Mixed into vLLM's worker. Every name starts with `lockstep_` so that none of vLLM's is hidden."""

    # The worker's own, which this class is mixed into.
    vllm_config: Any
    model_runner: Any
    rank: int
    device: torch.device

    def lockstep_memory(self) -> dict[str, int]:
        """Bytes: what this process holds of the host's memory and of its device, and what the device has free and in all."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found = {"resident": pages * os.sysconf("SC_PAGE_SIZE")}
        if self.device.type != "cuda":
            return found
        free, total = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        return found | {"reserved": reserved, "device_free": free, "device_total": total}

    def lockstep_empty_cache(self) -> None:
        """Gives memory that this process's allocator keeps for later back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def lockstep_sync_connect(self, info: dict[str, Any]) -> dict[str, Any]:
        """Joins the sender; blocks until all have joined."""
        parallel = self.vllm_config.parallel_config
        rank = 1 + parallel.data_parallel_index * parallel.world_size + self.rank
        try:
            self._lockstep_sync_state().transport = connect(info, rank, self.device)
        except (RuntimeError, ValueError) as error:
            return _refused("server", f"worker {rank} could not join the sender: {error}")
        return {}

    def lockstep_sync_plan(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Takes the plan of all syncs to come: resolves every name and checks that nothing is left out.

        A plan with `adapter` (the fields of an adapter_config.json) brings adapters instead of the model's weights.
        """
        if "adapter" in plan:
            return self._lockstep_sync_adapter_plan(plan)
        model = self.model_runner.get_model()
        state = self._lockstep_sync_state()
        shapes = {name: tuple(shape) for bucket in plan["buckets"] for name, _, shape, _ in bucket["slots"]}
        try:
            names = _resolved(model, shapes)
            _check_coverage(model, shapes, Path(self.vllm_config.model_config.model))
        except (UnknownWeightError, coverage.IncompleteError) as error:
            return _refused("weights", str(error))
        state.plan, state.names = plan, names
        return {}

    def lockstep_sync_receive(self, plan_id: str, version: str) -> dict[str, Any]:
        """Starts receiving and returns at once."""
        state = self._lockstep_sync_state()
        if state.transport is None or state.plan is None or state.plan["id"] != plan_id:
            return _refused("server", "no connection, or another plan than the one agreed on: connect again")
        if state.incoming is not None and state.incoming.thread.is_alive():
            return _refused("server", f"version {state.incoming.version} is still being received")
        thread = threading.Thread(target=self._lockstep_sync_run, daemon=True, name="lockstep-sync")
        state.incoming = _Incoming(version, thread)
        thread.start()
        return {}

    def lockstep_sync_progress(self) -> dict[str, Any]:
        """Where the receive stands: `done`, the digests so far, the tensor waited for, what went wrong."""
        incoming = self._lockstep_sync_state().incoming
        if incoming is None:
            return _refused("server", "nothing is being received")
        if incoming.failure:
            return _refused("server", f"while waiting for {incoming.waiting_for!r}: {incoming.failure}")
        done = not incoming.thread.is_alive()
        return {"done": done, "digests": incoming.digests if done else [], "waiting_for": incoming.waiting_for}

    def lockstep_sync_apply(self) -> dict[str, Any]:
        """Loads what was staged. Only while generation is paused."""
        state = self._lockstep_sync_state()
        incoming, state.incoming = state.incoming, None
        assert incoming is not None
        assert not incoming.thread.is_alive()
        weights = ((state.names[name], tensor) for name, tensor in incoming.weights)
        self.model_runner.reload_weights(weights_iterator=weights)
        return {}

    def lockstep_sync_stage_adapter(self, path: str) -> dict[str, Any]:
        """Keeps what was received as the adapter `path`, ready for vLLM to load."""
        state = self._lockstep_sync_state()
        incoming, state.incoming = state.incoming, None
        assert incoming is not None
        assert state.plan is not None
        memory_adapters.staged[path] = (state.plan["adapter"], dict(incoming.weights))
        return {}

    def lockstep_sync_forget_adapter(self, path: str) -> dict[str, Any]:
        """Frees a staged adapter; harmless when there is none."""
        memory_adapters.staged.pop(path, None)
        return {}

    def lockstep_sync_discard(self) -> dict[str, Any]:
        """Forgets what was staged. A receive that hangs keeps its connection busy: the next sync must connect again."""
        state = self._lockstep_sync_state()
        if state.incoming is not None and state.incoming.thread.is_alive():
            state.transport = None
        state.incoming = None
        return {}

    def _lockstep_sync_adapter_plan(self, plan: dict[str, Any]) -> dict[str, Any]:
        try:
            memory_adapters.check_config(plan["adapter"], self.vllm_config.lora_config)
        except ValueError as error:
            return _refused("weights", str(error))
        memory_adapters.apply()
        self._lockstep_sync_state().plan = plan
        return {}

    def _lockstep_sync_run(self) -> None:
        state = self._lockstep_sync_state()
        incoming, plan, transport = state.incoming, state.plan, state.transport
        assert incoming is not None
        assert plan is not None
        assert transport is not None
        for index, bucket in enumerate(plan["buckets"]):
            incoming.waiting_for = bucket["slots"][0][0]
            # A buffer of its own for each bucket: the tensors loaded later are views of it.
            bytes_N = torch.empty(bucket["nbytes"], dtype=torch.uint8, device=self.device)
            try:
                transport.receive(bytes_N)
            except RuntimeError as error:
                incoming.failure = str(error)
                return
            incoming.digests.append(digest(bytes_N, index))
            incoming.weights += [(slot[0], _view(bytes_N, slot)) for slot in bucket["slots"]]
        incoming.waiting_for = ""

    def _lockstep_sync_state(self) -> _State:
        if not hasattr(self, "_lockstep_sync"):
            self._lockstep_sync = _State()
        return self._lockstep_sync


def _view(bytes_N: torch.Tensor, slot: list[Any]) -> torch.Tensor:
    _, dtype_name, shape, offset = slot
    dtype = getattr(torch, dtype_name)
    count = 1
    for size in shape:
        count *= size
    return bytes_N[offset : offset + count * dtype.itemsize].view(dtype).view(shape)


def _resolved(model: torch.nn.Module, names: Any) -> dict[str, str]:
    """Shipped name to the name for `load_weights`."""
    # A tied head is a second name of the embedding: a sender may ship it too.
    live = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    map_name = None if mapper is None else mapper.map_name
    packed = getattr(model, "packed_modules_mapping", None) or {}
    return {name: resolve(name, live, packed, map_name) for name in names}


def _check_coverage(model: torch.nn.Module, sent: dict[str, tuple[int, ...]], folder: Path) -> None:
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))

    def optional(name: str) -> bool:
        if tied and name.endswith("lm_head.weight"):
            return True
        # What the model itself drops or has no tower for: vision weights of a text-only server, draft layers.
        if mapper is not None and mapper.map_name(name) is None:
            return True
        return ".visual." in f".{name}" or name.startswith("mtp.")

    coverage.check(sent, coverage.checkpoint_shapes(folder), optional)


def _refused(kind: str, message: str) -> dict[str, Any]:
    return {"error": kind, "message": message}
