"""The worker's part of a weight sync, added to vLLM's worker by `--worker-extension-cls`.

A `staged` sync has two halves. Buckets are received into memory of their own while the engine goes
on. Then `lockstep_sync_apply`, called while generation is paused, puts them into the model. Until
that call nothing live is touched. A `streamed` sync is for a server without room for a second copy.
While generation is paused, buckets go straight into the live parameters (`in_place_load.py`).

Methods answer `{"error": kind, "message": text}` for what is the sender's to fix; an exception
would be vLLM's end.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lockstep_vllm import patches
from lockstep_vllm.adapters import from_folder, from_memory
from lockstep_vllm.names import UnknownWeightError, resolve
from lockstep_vllm.weight_sync import coverage
from lockstep_vllm.weight_sync.identity import Expected, Identity, described
from lockstep_vllm.weight_sync.in_place_load import DirectPlan, DirectUnavailableError, make_plan
from lockstep_vllm.weight_sync.receive import Incoming
from lockstep_wire import error_kinds
from lockstep_wire.plan import WirePlan, assemble, parse
from lockstep_wire.transports import Receiver as Connection
from lockstep_wire.transports import connect

logger = logging.getLogger("vllm.lockstep")

_MARGIN = 1 << 30
"""Bytes of a GPU's memory that staging leaves alone."""
_ALIGNMENT = 512
"""Bytes; of a bucket in memory that it shares with others."""


@dataclass
class _State:
    transports: list[Connection] = field(default_factory=list)
    plan: WirePlan | None = None
    adapter: dict[str, Any] | None = None
    names: dict[str, str] = field(default_factory=dict)
    direct: DirectPlan | None = None
    slot_writer: from_memory.SlotWriter | None = None
    verified: bool = False
    """The direct path wrote what `load_weights` wrote, in this server, once."""
    identity: Identity | None = None
    """Of the pieces of the direct path, also where weights go through `load_weights`."""
    expected: Expected | None = None
    staging: list[torch.Tensor] = field(default_factory=list)
    turning: list[torch.Tensor] = field(default_factory=list)
    incoming: Incoming | None = None


class Receiver:
    """A mixin of vLLM's worker, whose attributes these are. Its own names begin with `lockstep_`, and hide none of them."""

    vllm_config: Any
    model_runner: Any
    reload_weights: Any
    rank: int
    device: torch.device

    def lockstep_alive(self) -> None:
        """An answer is all that is asked for."""

    def lockstep_memory(self) -> dict[str, int]:
        """Bytes: this process's host memory, adapters and device memory; the device's free and all."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes = {"resident": pages * os.sysconf("SC_PAGE_SIZE"), "adapters": from_memory.nbytes()}
        if self.device.type != "cuda":
            return sizes
        free, total = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        return sizes | {"reserved": reserved, "device_free": free, "device_total": total}

    def lockstep_free_buffers(self) -> None:
        """Return the last sync's buffers, and torch's cached memory, to the device."""
        self._lockstep_sync_drop_buffers()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def lockstep_sync_connect(self, infos: list[dict[str, Any]]) -> dict[str, Any]:
        """Joins every sender, in their order; blocks until all have joined."""
        parallel = self.vllm_config.parallel_config
        rank = 1 + parallel.data_parallel_index * parallel.world_size + self.rank
        state = self._lockstep_sync_state()
        self._lockstep_sync_hang_up()
        for sender, info in enumerate(infos):
            try:
                state.transports.append(connect(info, rank, self.device))
            except (RuntimeError, ValueError) as error:
                self._lockstep_sync_hang_up()
                return _refused(error_kinds.SERVER, f"worker {rank} could not join sender {sender}: {error}")
        return {}

    def lockstep_sync_plan(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Takes the plan of all syncs to come: resolves every name, checks that nothing is left
        out, and plans the direct path.

        A plan with `adapter` (the fields of an adapter_config.json) brings adapters instead of the
        model's weights.
        """
        state = self._lockstep_sync_state()
        if state.plan is not None and state.plan.id == raw.get("id") and state.adapter == raw.get("adapter"):
            return {}  # the same again, after a new connection
        self.lockstep_sync_release()
        try:
            plan = parse(raw)
            if "adapter" in raw:
                from_memory.check_config(raw["adapter"], self.vllm_config.lora_config)
                patches.apply("worker", on_cpu=False)
                state.slot_writer = from_memory.make_slot_writer(self.model_runner.lora_manager, raw["adapter"], plan)
            else:
                model = self.model_runner.get_model()
                shapes = {name: meta.shape for name, meta in plan.metas.items()}
                state.names = _resolved(model, shapes)
                _check_coverage(model, shapes, Path(self.vllm_config.model_config.model), raw.get("skipped", ()))
                state.direct = self._lockstep_sync_direct(plan)
                state.identity = None if state.direct is None else Identity(state.direct, self.device)
        except (UnknownWeightError, ValueError) as error:
            return _refused(error_kinds.WEIGHTS, str(error))
        state.plan, state.adapter = plan, raw.get("adapter")
        return {}

    def lockstep_sync_choose(self, plan_id: str, policy: str) -> dict[str, Any]:
        """The possible policy: `staged` or `streamed`; for "auto" `staged` where memory allows."""
        state = self._lockstep_sync_state()
        plan = state.plan
        if not state.transports or plan is None or plan.id != plan_id:
            return _refused(error_kinds.SERVER, "no connection, or another plan than the one agreed on: connect again")
        if state.incoming is not None and not state.incoming.done:
            return _refused(error_kinds.SERVER, f"version {state.incoming.version} is still being received")
        missing = 0 if state.staging else plan.nbytes + _MARGIN
        room = self.device.type != "cuda" or missing <= _free(self.device)
        if policy == "auto":
            policy = "staged" if room or state.direct is None else "streamed"
        if policy == "streamed" and state.direct is None:
            return _refused(
                error_kinds.WEIGHTS, "this server can't take weights in place: ask for 'staged', or see its log for why"
            )
        if policy == "staged" and not room:
            return _refused(
                error_kinds.WEIGHTS,
                f"worker {self.rank} has {_free(self.device) / 2**30:.1f} GiB free and a second copy of the weights needs "
                f"{missing / 2**30:.1f}: lower gpu_memory_utilization",
            )
        return {"policy": policy}

    def lockstep_sync_receive(self, plan_id: str, version: str, policy: str) -> dict[str, Any]:
        """Start to receive. Refuses like `lockstep_sync_choose`. `streamed` needs a paused engine."""
        state = self._lockstep_sync_state()
        chosen = self.lockstep_sync_choose(plan_id, policy)
        if "error" in chosen:
            return chosen
        plan, direct = state.plan, state.direct
        assert plan is not None
        if policy == "streamed":
            assert direct is not None
            state.turning = state.turning or [self._lockstep_sync_buffer(plan.largest) for _ in range(2)]
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seen = self._lockstep_sync_expect(state)
            state.incoming = Incoming(version, plan, state.transports, state.turning, self.device, direct.copy, seen)
        else:
            if state.adapter is not None:
                # An adapter's tensors stay where they are received, so every one gets memory of its
                # own, all of it at once.
                state.staging = self._lockstep_sync_buffers(plan)
            elif not state.staging:
                state.staging = [self._lockstep_sync_buffer(bucket.nbytes) for bucket in plan.buckets]
            seen = self._lockstep_sync_expect(state)
            state.incoming = Incoming(version, plan, state.transports, state.staging, self.device, seen=seen)
        state.incoming.start()
        return {}

    def lockstep_sync_progress(self, seconds: float) -> dict[str, Any]:
        """The receive after at most `seconds`: `done`, digests, the awaited tensor, the failure."""
        incoming = self._lockstep_sync_state().incoming
        if incoming is None:
            return _refused(error_kinds.SERVER, "nothing is being received")
        done = incoming.wait(seconds)
        if incoming.failure:
            return _refused(error_kinds.SERVER, f"while waiting for {incoming.waiting_for!r}: {incoming.failure}")
        return {"done": done, "digests": incoming.digests if done else [], "waiting_for": incoming.waiting_for}

    def lockstep_sync_apply(self) -> dict[str, Any]:
        """Puts what was staged into the model and reads it back. Only while generation is paused.

        The answer names the path, and says if a comparison was possible. A mismatch comes too late
        to keep the old weights.
        """
        state = self._lockstep_sync_state()
        incoming, state.incoming = state.incoming, None
        assert incoming is not None
        assert incoming.done
        direct = incoming.streamed or (state.direct is not None and state.verified)
        if direct:
            self._lockstep_sync_copy(state, streamed=incoming.streamed)
        else:
            assert state.plan is not None
            weights = ((state.names[name], tensor) for name, tensor in assemble(state.plan, state.staging))
            self.reload_weights(weights_iterator=weights)
        refused = self._lockstep_sync_differing(state, incoming.version, direct)
        if state.direct is None:
            state.staging = []
        if refused:
            return _refused(error_kinds.MISMATCH, refused)
        return {"path": "direct" if direct else "load_weights", "compared": state.identity is not None}

    def lockstep_sync_stage_adapter(self, path: str) -> dict[str, Any]:
        """Keeps what was received as the adapter `path`, ready for vLLM to load."""
        state = self._lockstep_sync_state()
        incoming, state.incoming = state.incoming, None
        assert incoming is not None
        assert state.plan is not None
        assert state.adapter is not None
        expected = None if state.slot_writer is None else state.slot_writer.expected(state.staging)
        from_memory.staged[path] = from_memory.Staged(
            state.adapter, state.plan, state.staging, state.slot_writer, expected
        )
        state.staging = []
        return {}

    def lockstep_sync_verify_adapter(self, path: str, lora_id: int, version: str) -> dict[str, Any]:
        """Read a staged adapter's slot back. `compared`: true if a comparison was possible."""
        refused, compared = from_memory.refusal(path, lora_id, version, self.rank, self.model_runner.lora_manager)
        return _refused(error_kinds.MISMATCH, refused) if refused else {"compared": compared}

    def lockstep_sync_verify_folder(self, folder: str, lora_id: int, version: str) -> dict[str, Any]:
        """The same for an adapter that vLLM loaded from a folder."""
        try:
            manager = self.model_runner.lora_manager
            refused, compared = from_folder.refusal(Path(folder), lora_id, version, self.rank, manager)
        except ValueError as error:
            return _refused(error_kinds.WEIGHTS, str(error))
        return _refused(error_kinds.MISMATCH, refused) if refused else {"compared": compared}

    def lockstep_sync_forget_adapter(self, path: str) -> dict[str, Any]:
        """Frees a staged adapter that no request uses; harmless when there is none."""
        from_memory.forget(path, self.model_runner.lora_manager)
        return {}

    def lockstep_sync_discard(self) -> dict[str, Any]:
        """Forget the staged bytes. After a receive that hangs the next sync must connect again.

        `touched`: live weights may have been overwritten. `waiting_for`: the tensor that had not
        come yet.
        """
        state = self._lockstep_sync_state()
        incoming, state.incoming = state.incoming, None
        if state.adapter is not None:
            state.staging = []  # the next one gets memory of its own
        if incoming is not None and not incoming.done:
            self._lockstep_sync_drop_buffers()  # a late bucket must not land in the next sync's
            self._lockstep_sync_hang_up()
        waiting_for = "" if incoming is None else incoming.waiting_for
        return {"touched": incoming is not None and incoming.streamed, "waiting_for": waiting_for}

    def lockstep_sync_release(self) -> dict[str, Any]:
        """Free the buffers and the plan, which holds addresses, before weights move or sleep."""
        state = self._lockstep_sync_state()
        state.plan, state.adapter, state.direct, state.verified = None, None, None, False
        state.slot_writer, state.identity, state.expected = None, None, None
        state.staging, state.turning, state.incoming = [], [], None
        return {}

    def _lockstep_sync_direct(self, plan: WirePlan) -> DirectPlan | None:
        """The direct path's plan. None, with a line in the log, where copies can't fill the model."""
        from vllm.config import set_current_vllm_config

        model = self.model_runner.get_model()
        names = self._lockstep_sync_state().names

        def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            model.load_weights((names[name], weight) for name, weight in weights)

        try:
            with set_current_vllm_config(self.vllm_config):
                return make_plan(dict(model.named_parameters()), plan.metas, plan.buckets, load)
        except DirectUnavailableError as error:
            logger.info("no direct path for weights: %s", error)
            return None

    def _lockstep_sync_copy(self, state: _State, *, streamed: bool) -> None:
        """The planned copies (a streamed sync has made them already), and what `reload_weights`
        does beside loading.
        """
        assert state.direct is not None
        if not streamed:
            for number, bytes_N in enumerate(state.staging):
                state.direct.copy(number, bytes_N)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.model_runner.reset_lora_state()
        self.model_runner.reset_encoder_cache()
        self.model_runner.reset_mm_cache()

    def _lockstep_sync_expect(self, state: _State) -> Callable[[int, torch.Tensor], None] | None:
        state.expected = None if state.identity is None else state.identity.expect()
        return None if state.expected is None else state.expected.add

    def _lockstep_sync_differing(self, state: _State, version: str, direct: bool) -> str:
        """The difference between the live weights and the sent bytes; "" for none.

        Weights that vLLM loaded itself may lie in another order, for its kernels. The direct path,
        which copies them as they come, is then closed.
        """
        if state.identity is None or state.expected is None:
            return ""
        differences = state.identity.differing(state.expected.read())
        if direct:
            return described(version, self.rank, differences) if differences else ""
        live = dict(self.model_runner.get_model().named_parameters())
        owners = {difference.owner for difference in differences}
        moved = {owner for owner in owners if state.identity.rearranged(owner, live[owner].detach(), state.staging)}
        differences = [difference for difference in differences if difference.owner not in moved]
        if differences:
            return described(version, self.rank, differences)
        state.verified = not moved
        if moved and state.direct is not None:
            logger.info("no direct path for weights: %s, say, is kept in another order than it is loaded", min(moved))
            state.direct = None
        return ""

    def _lockstep_sync_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _lockstep_sync_drop_buffers(self) -> None:
        """The buffers of buckets, and the direct path's views of them, which would keep them alive."""
        state = self._lockstep_sync_state()
        state.staging, state.turning = [], []
        if state.direct is not None:
            state.direct.forget_buffers()

    def _lockstep_sync_buffers(self, plan: WirePlan) -> list[torch.Tensor]:
        """One for every bucket, in one piece of memory."""
        starts = [0]
        for bucket in plan.buckets:
            starts.append(starts[-1] + -(-bucket.nbytes // _ALIGNMENT) * _ALIGNMENT)
        buffer = self._lockstep_sync_buffer(starts[-1])
        return [buffer[start : start + bucket.nbytes] for start, bucket in zip(starts, plan.buckets, strict=False)]

    def _lockstep_sync_hang_up(self) -> None:
        state = self._lockstep_sync_state()
        transports, state.transports = state.transports, []
        for transport in transports:
            transport.close()

    def _lockstep_sync_state(self) -> _State:
        if not hasattr(self, "_lockstep_sync"):
            self._lockstep_sync = _State()
        return self._lockstep_sync


def _free(device: torch.device) -> int:
    """Bytes a GPU has left, those that torch holds without use among them."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _resolved(model: torch.nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Shipped name to the name for `load_weights`."""
    # A tied head is a second name of the embedding: a sender may ship it too.
    live = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    map_name = None if mapper is None else mapper.map_name
    packed = getattr(model, "packed_modules_mapping", None) or {}
    return {name: resolve(name, live, packed, map_name) for name in names}


def _check_coverage(
    model: torch.nn.Module, sent: dict[str, tuple[int, ...]], folder: Path, skipped: Sequence[str]
) -> None:
    """skipped: starts of names that the trainer carries over untouched and the server does not
    load.
    """
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))

    def optional(name: str) -> bool:
        if tied and name.endswith("lm_head.weight"):
            return True
        if mapper is not None and mapper.map_name(name) is None:  # the model itself drops it
            return True
        return name.startswith(tuple(skipped))

    coverage.check(sent, coverage.checkpoint_shapes(folder), optional)


def _refused(kind: str, message: str) -> dict[str, Any]:
    return {"error": kind, "message": message}
