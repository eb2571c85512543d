"""The state of one trainer rank between requests: model, trainables, optimizer. It is made, loaded
and saved here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.config.megatron import Parallel
from lockstep.engine.build import DTYPES, build, sizes_here
from lockstep.engine.layers import compiled_ops
from lockstep.engine.model import Model
from lockstep.engine.optim.optimizer import Optimizer
from lockstep.engine.optim.state import FILE, OnHost, read_state, write_state
from lockstep.engine.optim.state_file import StateFile
from lockstep.engine.optim.trainable import Trainable, assign, attach_adapters, base_trainables
from lockstep.engine.parallel import device
from lockstep.engine.parallel.progress import progress
from lockstep.errors import ConfigError, StoreError, WeightsError
from lockstep.models.checkpoint.export import export_checkpoint
from lockstep.models.checkpoint.load import kept_dtype, load_shards
from lockstep.models.checkpoint.peft import AdapterInfo, read_adapter, write_adapter
from lockstep.models.checkpoint.read import Checkpoint, expected_tensors, open_checkpoint
from lockstep.models.config import ModelConfig
from lockstep.models.contract import LoraSite, Shard
from lockstep.models.handler import ModelSupportHandler
from lockstep.models.parallel_sizes import check_heads, stage_layers
from lockstep.models.registry import get_model_support_handler, load_model_config
from lockstep.trainer.protocol import EngineConfig, LoraSettings

Shape = tuple[int, ...]


@dataclass
class TrainerState:
    """One rank's state.

    shapes: of every tensor trained on any rank, by canonical name.
    sites: every LoRA pair of the whole model.
    """

    settings: EngineConfig
    config: ModelConfig
    handler: ModelSupportHandler
    checkpoint: Checkpoint
    shards: list[Shard]
    model: Model
    trainables: list[Trainable]
    optimizer: Optimizer
    shapes: dict[str, Shape]
    sites: list[LoraSite]

    @property
    def parallel(self) -> Parallel:
        return self.settings.parallel

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.settings.dtype]


def open_trainer(settings: EngineConfig) -> TrainerState:
    """Build and load everything on this rank; process groups must be up. Raises LockstepError
    before anything large is allocated.
    """
    folder = Path(settings.model)
    handler = get_model_support_handler(str(folder), allow_unvalidated_arch=settings.allow_unvalidated_arch)
    config = load_model_config(str(folder))
    checkpoint = open_checkpoint(folder, handler, config)
    sizes = sizes_here()
    layers = stage_layers(config.layers, settings.parallel.pipeline, settings.stages)[sizes.pp_rank]
    shards = handler.shards(config, checkpoint.layout, sizes, layers)
    all_shards = handler.all_shards(config, checkpoint.layout)
    sites = [site for shard in all_shards for site in shard.sites]
    initial = None
    if settings.adapter is not None:
        initial, info = read_adapter(settings.adapter, sites, config, checkpoint.layout)
        settings = replace(settings, lora=LoraSettings(info.rank, info.alpha, info.targets))
    _check_targets(all_shards, settings.lora)
    check_heads(config, settings.parallel)
    _preflight(shards, settings)
    compiled = device.CUDA if settings.compile is None else settings.compile
    compiled_ops.enable(handler.compile.regions if compiled else ())
    model = build(config, settings.parallel, DTYPES[settings.dtype], layers, bool(settings.recompute))
    _load(model, checkpoint, shards, DTYPES[settings.dtype])
    if settings.lora is None and not settings.trains:
        shapes, trainables = {}, []
    elif settings.lora is None:
        shapes = expected_tensors(handler, config, checkpoint.layout)
        shapes = {name: shape for name, shape in shapes.items() if name in _read_names(all_shards)}
        trainables = base_trainables(model, shards, shapes)
    else:
        lora = settings.lora
        shapes = _adapter_shapes(all_shards, lora)
        trainables = attach_adapters(model, shards, lora.targets, lora.rank, lora.alpha, settings.seed)
    if initial is not None:
        assign(trainables, initial)
    # Masters are fp32 also where the model computes in fp64: a step is the same, whatever computed
    # it.
    narrow = torch.float32 if DTYPES[settings.dtype] == torch.float64 else None
    optimizer = Optimizer(trainables if settings.trains else [], settings.parallel, config.tied, narrow)
    return TrainerState(settings, config, handler, checkpoint, shards, model, trainables, optimizer, shapes, sites)


def _read_names(shards: Sequence[Shard]) -> set[str]:
    return {piece.name for shard in shards for piece in shard.pieces if piece.name}


def _adapter_shapes(shards: Sequence[Shard], lora: LoraSettings) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for site in (s for shard in shards for s in shard.sites if s.target in lora.targets):
        shapes[f"{site.module}.lora_A"] = (lora.rank, site.in_features)
        shapes[f"{site.module}.lora_B"] = (site.out_features, lora.rank)
    return shapes


def _check_targets(shards: Sequence[Shard], lora: LoraSettings | None) -> None:
    if lora is None:
        return
    known = sorted({site.target for shard in shards for site in shard.sites})
    unknown = sorted(set(lora.targets) - set(known))
    if unknown or not lora.targets:
        raise ConfigError(
            f"LoRA target {(unknown or ['(none)'])[0]!r} does not exist in this model; it has {', '.join(known)}"
        )


def _preflight(shards: Sequence[Shard], settings: EngineConfig) -> None:
    """Weights, and for full fine-tuning fp32 gradients here and three fp32 copies spread over the
    replicas.
    """
    elements = sum(torch.Size(s.shape).numel() for s in shards)
    needed = elements * DTYPES[settings.dtype].itemsize
    if settings.lora is None and settings.trains:
        needed += (
            elements * DTYPES[settings.dtype].itemsize + elements * 4 + elements * 12 // settings.parallel.replicas
        )
    device.require_memory(
        needed, f"this rank's part of {settings.model} ({elements / 1e9:.2f}B parameters in {settings.dtype})"
    )


@torch.no_grad()
def _load(model: Model, checkpoint: Checkpoint, shards: Sequence[Shard], dtype: torch.dtype) -> None:
    """Fill the model's parameters, of `dtype` but for those that keep the checkpoint's fp32."""
    parameters = dict(model.named_parameters())
    missing = set(parameters) - {s.megatron for s in shards}
    if missing:
        raise WeightsError(f"the weight contract has nothing for {sorted(missing)[0]} ({len(missing)} parameters)")
    kept = {shard.megatron: kept_dtype(checkpoint, shard, dtype) for shard in shards}
    for name, tensor in load_shards(checkpoint, shards, device=device.device()):
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise WeightsError(
                f"the weight contract gives {name} {list(tensor.shape)}, which the model does not have in that shape"
            )
        if kept[name] != dtype:
            parameters[name].data = torch.empty_like(tensor, dtype=kept[name])
        parameters[name].copy_(tensor)


def load_step(trainer: TrainerState, folder: Path) -> int:
    """Take over a step's optimizer state, and with it its weights. Returns the optimizer steps
    until then.

    Raises WeightsError when it does not fit; nothing is changed then.
    """
    state = folder / "trainer"
    if not (state / FILE).is_file():
        raise WeightsError(f"{state / FILE} does not exist; give the folder of a published step")
    read_state(trainer.optimizer, state)
    return trainer.optimizer.count


def start_from(trainer: TrainerState, folder: Path) -> None:
    """Take over an adapter's values.

    Raises WeightsError for a damaged folder or another base model's, and ConfigError for an adapter
    of another rank, scale or set of targets; nothing is changed then.
    """
    tensors, info = read_adapter(folder, trainer.sites, trainer.config, trainer.checkpoint.layout)
    _check_shape(trainer, info, f"[model] lora: {folder}")
    trainer.optimizer.assign_masters(tensors)


def _check_shape(trainer: TrainerState, info: AdapterInfo, what: str) -> None:
    """Raise ConfigError for an adapter of another rank, scale or set of targets than the trainer's."""
    here, theirs = trainer.settings.lora, LoraSettings(info.rank, info.alpha, info.targets)
    if here is None or (here.rank, here.alpha, set(here.targets)) != (info.rank, info.alpha, set(info.targets)):
        raise ConfigError(f"{what} is an adapter of {theirs}, the run's is {here}: they must be the same")


def save_step(trainer: TrainerState, folder: Path, on_host: OnHost | None = None) -> tuple[str, ...]:
    """Write `folder/trainer/optimizer.safetensors`, and `folder/adapter/` (LoRA) or `folder/model/`
    (all weights). The latter is a Hugging Face folder in the layout and dtype of the base
    checkpoint. Collective; all ranks must see the folder.

    on_host: as for `write_state`; nothing else is read from the device.

    Returns the files, relative to the folder.
    """
    state = folder / "trainer"
    if state.exists():  # seen by every rank, so that all of them fail
        raise StoreError(f"{state} already exists; a step is written once, give a new folder")
    dist.barrier()
    if dist.get_rank() == 0:
        state.mkdir(parents=True)
    dist.barrier()
    write_state(trainer.optimizer, state, trainer.shapes, on_host)
    if dist.get_rank() == 0:
        if trainer.settings.lora is not None:
            _write_adapter(trainer, folder / "adapter", state)
        else:
            export_checkpoint(trainer.checkpoint, _masters(trainer, state), folder / "model")
    dist.barrier()
    return tuple(sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()))


def _masters(trainer: TrainerState, state: Path) -> Iterator[tuple[str, Tensor]]:
    """The whole masters of everything that is trained, one at a time."""
    file = StateFile(state / FILE)
    for name, shape in trainer.shapes.items():
        yield name, torch.from_numpy(file.view(f"master/{name}", shape).copy())
        progress.count += 1
    file.close()


def _write_adapter(trainer: TrainerState, folder: Path, state: Path) -> None:
    """The masters of the file just written, rounded to the model's dtype: exactly what the forward
    pass uses.

    A model that computes in fp64 uses the masters as they are.
    """
    lora = trainer.settings.lora
    assert lora is not None
    dtype = torch.float32 if trainer.dtype == torch.float64 else trainer.dtype
    tensors = {name: master.to(dtype) for name, master in _masters(trainer, state)}
    info = AdapterInfo(trainer.settings.model, lora.rank, lora.alpha, lora.targets)
    write_adapter(folder, tensors, info, trainer.config, trainer.checkpoint.layout)


@contextmanager
def reference_weights(trainer: TrainerState, folder: Path) -> Iterator[None]:
    """Another published step's weights in the model while the block runs; the present ones come
    back in any case. Raises ConfigError for an adapter of another shape.
    """
    try:
        if trainer.settings.lora is not None:
            adapter = folder / "adapter"
            tensors, info = read_adapter(adapter, trainer.sites, trainer.config, trainer.checkpoint.layout)
            _check_shape(trainer, info, f"the KL reference {adapter}")
            assign(trainer.trainables, tensors)
        else:
            file = StateFile(folder / "trainer" / FILE, private=True)
            assign(trainer.trainables, Masters(file, trainer.shapes))
            file.close()
        yield
    finally:
        trainer.optimizer.restore_weights()


class Masters(Mapping[str, Tensor]):
    """The masters of a state file by tensor name, each a view of the file. The pages of one view
    are not kept for the next.
    """

    def __init__(self, file: StateFile, shapes: Mapping[str, Shape]) -> None:
        self.file, self.shapes = file, shapes

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.file.view(f"master/{name}", self.shapes[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
