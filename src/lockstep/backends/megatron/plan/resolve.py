"""Every setting of a run, from the user's settings, the model and the machine, each value with its
reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lockstep.backends.megatron.plan import preflight
from lockstep.backends.megatron.plan.capacity import (
    GIB,
    WIDTH,
    Capacity,
    Footprint,
    is_large,
    on_cpu,
    on_gpu,
    row_limit,
)
from lockstep.backends.megatron.plan.exact import check_exact
from lockstep.backends.megatron.plan.placement import Devices, check_processes, resolve_placement, resolve_transport
from lockstep.backends.megatron.plan.settings import ResolvedSettings, routed_experts_shape
from lockstep.batching.pack import MOST_ROW_LENGTH
from lockstep.config.base import unsupported
from lockstep.config.megatron import MegatronConfig, Parallel
from lockstep.errors import ConfigError
from lockstep.inference.launch import LoraServing
from lockstep.inference.parsers import check_reasoning, resolve_tool_calls
from lockstep.inference.tokenizer_files import argument, read_tokenizer
from lockstep.models.config import ModelConfig, checkpoint_dtype, parse_config, read_json
from lockstep.models.contract import Layout
from lockstep.models.registry import get_model_support_handler_for_spec, get_model_support_spec
from lockstep.process.free_memory import host_available
from lockstep.runs.retention import Retention

if TYPE_CHECKING:
    from lockstep.model import TrainableModel
    from lockstep.models.spec import ModelSupportSpec

_OFFLOADED = 2 * GIB
"""The bytes that a trainer leaves on a shared GPU while its weights are on the host."""


@dataclass(frozen=True)
class Setting:
    """One resolved setting: `why` says who decided."""

    name: str
    value: Any
    why: str

    @property
    def text(self) -> str:
        """The value as a person reads it."""
        if self.value is None:
            return "none"
        if isinstance(self.value, bool):
            return str(self.value).lower()
        if isinstance(self.value, list | tuple):
            return ", ".join(map(str, self.value)) or "none"
        return str(self.value)


@dataclass(frozen=True)
class Plan:
    """A run before anything of it is started.

    notes: what the user should know although it works, one line each.
    """

    resolved: ResolvedSettings
    vocab_size: int
    settings: tuple[Setting, ...]
    notes: tuple[str, ...]

    def stored(self) -> dict[str, Any]:
        """The settings by name, as the run's folder keeps them."""
        return {setting.name: setting.value for setting in self.settings}


@dataclass
class _Log:
    """Settings and notes in the order in which they were decided."""

    settings: list[Setting] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, value: Any, why: str) -> None:
        self.settings.append(Setting(name, value, why))


def make_plan(asked: MegatronConfig, model: TrainableModel, base: Path) -> Plan:
    """Resolve and check everything that can be known now.

    asked: what the user set; None where the model and the machine decide.
    base: the model's folder; its weights need not be there yet.

    Raises ConfigError or UnsupportedModelError, in one line, for what could not run.
    """
    if model.lora is None and not asked.merged:
        raise unsupported("lora", None, "MegatronBackend", "full weights need rollout_weights_mode 'merged'")
    spec = get_model_support_spec(str(base))
    config = parse_config(read_json(base), spec, source=f"{model.base_model}: config.json")
    devices, log = resolve_placement(asked.placement, asked.replicas), _Log()
    check_processes(devices, asked.parallel)
    preflight.check_shape(config, asked.parallel, devices)
    if asked.offload and not devices.colocated:
        raise unsupported("offload", True, "MegatronBackend", "trainer and server don't share GPUs: leave it out")
    tokenizer = read_tokenizer(base, asked.server_args)
    preflight.check_tokenizer(tokenizer, config)
    tools = resolve_tool_calls(asked.tool_call_parser, spec.tool_call_parser, tokenizer, asked.server_args)
    reasoning = check_reasoning(tokenizer, asked.server_args)
    _describe_model(log, model, spec, config, asked)
    _describe_devices(log, devices, asked)
    dtype = _dtype(log, asked, model, base, devices)
    if asked.exact:
        check_exact(spec, config, dtype, "merged" if asked.merged else "lora", devices)
    shards = get_model_support_handler_for_spec(spec).all_shards(config, Layout())
    preflight.check_lora(model.lora, spec, shards)
    targets = (model.lora.target_modules or spec.default_target_modules) if model.lora else ()
    footprint = Footprint.of(shards, targets, model.lora.rank if model.lora else 0)
    capacity, rows = _capacity(log, asked, model, config, dtype, devices, footprint)
    own = asked.tool_call_parser is not None or argument(asked.server_args, "tool-call-parser") is not None
    log.add("tool_call_parser", tools.parser, "set" if own else tools.off or "the family's")
    log.notes += [tools.note] if tools.note else []
    log.add("reasoning_parser", reasoning, "set in server_args" if reasoning else "default")
    _describe_disk(log, asked, model, footprint, dtype)
    resolved = ResolvedSettings(
        base=base,
        spec=spec,
        lora=model.lora,
        merged=asked.merged,
        dtype=dtype,
        parallel=asked.parallel,
        devices=devices,
        offload=devices.colocated and asked.offload is not False,
        transport=resolve_transport(asked.weight_transport, devices),
        vocabulary=config.vocab_size,
        routed_experts=routed_experts_shape(config) if asked.enable_expert_replay else None,
        seed=asked.seed,
        recompute=asked.recompute,
        max_model_len=capacity.max_model_len,
        max_num_seqs=capacity.slots,
        kv_cache_bytes=capacity.cache,
        tools=tools,
        server_args=asked.server_args,
        exact=asked.exact,
        row_limit=rows,
    )
    _describe_rest(log, resolved, asked)
    return Plan(resolved, config.vocab_size, tuple(log.settings), tuple(log.notes))


def _set(value: object, otherwise: str = "default") -> str:
    return otherwise if value is None else "set"


def _describe_model(
    log: _Log, model: TrainableModel, spec: ModelSupportSpec, config: ModelConfig, asked: MegatronConfig
) -> None:
    log.add("base_model", model.base_model, "set")
    log.add("family", spec.key, f"architecture {config.architecture}")
    log.add("rollout_weights_mode", "merged" if asked.merged else "lora", "set" if asked.merged else "default")
    if model.lora is None:
        log.add("lora", None, "set: all weights are trained")
    else:
        targets = model.lora.target_modules
        for name in ("rank", "alpha", "rslora", "start_from"):
            why = "set" if name in model.lora.model_fields_set else "default"
            log.add(f"lora.{name}", getattr(model.lora, name), why)
        log.add("lora.target_modules", list(targets or spec.default_target_modules), _set(targets, "the family's"))
    log.notes += [
        f"{model.base_model}: config.json sets {name}, which nobody reads: make sure that it changes nothing"
        for name in config.unknown_fields
    ]


def _describe_devices(log: _Log, devices: Devices, asked: MegatronConfig) -> None:
    by_itself = (
        "no GPU here" if devices.kind == "cpu" else "one GPU here, shared" if devices.colocated else "two GPUs here"
    )
    serving = [list(gpus) for gpus in devices.split] if devices.inference and devices.split else devices.inference
    for name, gpus in (("trainer", devices.trainer), ("inference", serving)):
        value = list(gpus) or "cpu"
        log.add(f"placement.{name}", value, _set(asked.placement, by_itself))
    log.add(
        "replicas", len(devices.servers), _set(asked.replicas, "placement.inference" if devices.split else "default")
    )
    parallel = asked.parallel
    sizes = {name: value for name, value in parallel.model_dump().items() if value not in (1, None)}
    text = ", ".join(f"{name} {value}" for name, value in sizes.items()) or "1 process"
    log.add("parallel", text, "set" if parallel != Parallel() else "default")


def _dtype(
    log: _Log, asked: MegatronConfig, model: TrainableModel, base: Path, devices: Devices
) -> Literal["float32", "bfloat16"]:
    adapters_on_gpu = devices.kind == "cuda" and model.lora is not None and not asked.merged
    if adapters_on_gpu and asked.dtype == "float32":
        raise ConfigError(
            "dtype = 'float32' can't serve adapters on a GPU: vLLM's LoRA kernels take float16 and bfloat16 only; leave dtype out, "
            "set it to bfloat16, or use rollout_weights_mode = merged"
        )
    stored = "float32" if asked.exact else asked.dtype or checkpoint_dtype(base)
    dtype, why = asked.dtype or stored, _set(asked.dtype, "numerics = exact" if asked.exact else "the checkpoint's")
    if adapters_on_gpu and dtype == "float32":
        dtype, why = "bfloat16", "the checkpoint is float32, and vLLM's LoRA kernels take float16 and bfloat16 only"
        log.notes.append(f"dtype is bfloat16: {why}")
    log.add("dtype", dtype, why)
    return dtype


def _number(server_args: tuple[str, ...], name: str) -> int | None:
    value = argument(server_args, name)
    return int(value) if value is not None and value.isdigit() else None


def _capacity(
    log: _Log,
    asked: MegatronConfig,
    model: TrainableModel,
    config: ModelConfig,
    dtype: str,
    devices: Devices,
    footprint: Footprint,
) -> tuple[Capacity, int]:
    """Context, requests and row length, checked against positions and memory. `server_args` win, as
    they do in the server.
    """
    inside = _number(asked.server_args, "max-model-len")
    length, slots = inside or asked.max_model_len, _number(asked.server_args, "max-num-seqs")
    if length is not None:
        preflight.check_length(length, config, model.base_model, None)
    width = WIDTH["float64" if asked.exact else dtype]
    if devices.kind == "cpu":
        capacity = on_cpu(config, dtype, host_available() // len(devices.servers), length, slots)
        room = None
        free = host_available() // 4  # of several processes, and weights that no GPU's figures hold
    else:
        capacity, free = _on_gpus(asked, model, config, dtype, devices, footprint, width, length, slots)
        room = capacity.cache_tokens
    if length is not None:
        preflight.check_length(length, config, model.base_model, room)
    log.add("max_model_len", capacity.max_model_len, _set(length, capacity.limit))
    holds = "" if capacity.cache_tokens is None else f": the KV cache holds some {capacity.cache_tokens} tokens"
    log.add("max_num_seqs", capacity.slots, "set in server_args" if slots else f"memory{holds}")
    if capacity.cache is not None:
        log.add("kv_cache_bytes", capacity.cache, "a share of the host's free memory")
    rows = row_limit(config, width, asked.parallel, free)
    why = "no longer row is worth it" if rows == MOST_ROW_LENGTH else "memory of the trainer"
    log.add("row_limit", rows, f"where [train] row_length is open: {why}")
    return capacity, rows


def _on_gpus(
    asked: MegatronConfig,
    model: TrainableModel,
    config: ModelConfig,
    dtype: str,
    devices: Devices,
    footprint: Footprint,
    width: int,
    length: int | None,
    slots: int | None,
) -> tuple[Capacity, int | None]:
    """The server's capacity, and the bytes that a trainer rank has left for activations; None if
    unknown.
    """
    per_rank = asked.parallel.tensor * asked.parallel.pipeline
    training = footprint.parameters * width // per_rank
    state = (footprint.adapter if model.lora else footprint.parameters) * 12 // per_rank
    given = argument(asked.server_args, "gpu-memory-utilization")
    utilization = float(given) if given else None
    memory = preflight.check_gpus(devices, training + state, utilization)
    ranks = min(map(len, devices.servers))  # the server with the least room
    served = 0 if asked.merged else LoraServing.model_fields["max_loras"].default * footprint.adapter
    weights = (footprint.parameters + served) * WIDTH[dtype] // ranks
    known = [memory[number] for number in devices.inference if number in memory]
    budget = None
    if known:
        left = _OFFLOADED if asked.offload is not False else _OFFLOADED + training + state
        if devices.colocated and utilization is None:
            budget = int(0.9 * min(gpu.free - left for gpu in known))
        else:
            budget = int((utilization or 0.9) * min(gpu.total for gpu in known))
    large = bool(known) and all(is_large(gpu.total) for gpu in known)
    training_free = [memory[number].free - training - state for number in devices.trainer if number in memory]
    return on_gpu(config, dtype, budget, large, ranks, weights, length, slots), min(training_free, default=None)


def _describe_disk(log: _Log, asked: MegatronConfig, model: TrainableModel, footprint: Footprint, dtype: str) -> None:
    needed = preflight.checkpoint_bytes(footprint, dtype, model.lora is not None, retention(asked))
    preflight.check_disk(asked.path, asked.path / model.project / model.name, needed)
    step = sum(preflight.step_bytes(footprint, dtype, model.lora is not None))
    log.add("path", str(asked.path), f"a step takes {_size(step)} of disk, the run at most {_size(needed)}")
    preflight.check_metric(asked.keep_best)
    for name in ("keep_newest", "keep_best", "keep_every", "keep_optimizer_states"):
        log.add(name, getattr(asked, name), "set" if name in asked.model_fields_set else "default")


def retention(config: MegatronConfig) -> Retention:
    """The published steps that the settings keep."""
    return Retention(config.keep_newest, config.keep_best, config.keep_every, config.keep_optimizer_states)


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def _describe_rest(log: _Log, resolved: ResolvedSettings, asked: MegatronConfig) -> None:
    log.add("weight_transport", resolved.transport, _set(asked.weight_transport, "fits the placement"))
    log.add(
        "offload", resolved.offload, _set(asked.offload, "shared GPUs" if resolved.colocated else "nothing is shared")
    )
    replays = "default" if resolved.routed_experts is not None else "the model has no experts"
    log.add(
        "enable_expert_replay", resolved.routed_experts is not None, replays if asked.enable_expert_replay else "set"
    )
    log.add(
        "recompute",
        "as memory asks for it" if resolved.recompute is None else resolved.recompute,
        _set(resolved.recompute),
    )
    log.add("seed", resolved.seed, "of the adapter's first values and the sampling")
    described = {setting.name for setting in log.settings} | {"path", "placement"}
    for name in (name for name in type(asked).model_fields if name not in described):
        value = getattr(asked, name)
        why = "set" if name in asked.model_fields_set else "default"
        log.add(name, list(value) if isinstance(value, tuple) else value, why)
