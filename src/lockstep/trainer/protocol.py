"""The requests of the parent and the answers of the trainer: one class for each verb and each
reply.

On the socket (`channel.py`) a request is `{"id", "verb", "args", "secret"}`: the fields of its
class. Fields listed in `secrets` stay in rank 0. A reply is `{"id", "result"}` with the fields of
the verb's `answer`. `Ready` answers the start. Every rank runs every verb. A verb that fails leaves
the trainer usable; where weights were already changed it refuses to go on until `Load`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from lockstep.config.megatron import Parallel
from lockstep.config.messages import describe
from lockstep.config.train import TrainConfig
from lockstep.errors import ConfigError

STRICT = ConfigDict(extra="forbid")
Answer = TypeVar("Answer")
T = TypeVar("T")


@dataclass(frozen=True, config=STRICT)
class LoraSettings:
    """rank: as in LoraConfig.
    alpha: its `applied_alpha`: the adapter's scale is alpha / rank.
    targets: never empty here; the parent fills in the family's default.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True, config=STRICT)
class EngineConfig:
    """engine.json: what a trainer is started with.

    model: a checkpoint folder.
    dtype: of the weights; float64 computes fp32 weights in fp64.
    lora: None trains all weights.
    adapter: a PEFT folder to start from; rank, alpha and targets are its own then, and lora stays
        None.
    recompute: all activations in the backward pass, or none; None decides for each batch by the
        memory there is.
    compile: run the regions that the family's policy names through torch.compile; None: on a GPU.
    stages: layers per pipeline stage; None: even.
    timeout_s: of the start and of collectives, in seconds.
    trains: False for scoring only: no gradients, no optimizer state, and of the verbs only those in
        `SCORING`.
    """

    model: str
    parallel: Parallel = dataclasses.field(default_factory=Parallel)
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    lora: LoraSettings | None = None
    adapter: str | None = None
    seed: int = 0
    recompute: bool | None = None
    compile: bool | None = None
    stages: tuple[int, ...] | None = None
    allow_unvalidated_arch: bool = False
    timeout_s: float = 600.0
    trains: bool = True


class Request(Generic[Answer]):
    """Base of the requests.

    secrets: fields that rank 0 passes to no other rank.
    """

    verb: ClassVar[str]
    answer: ClassVar[type[Any]]
    secrets: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True, config=STRICT)
class Ready:
    """The model is loaded.

    trained_parameters_rank0: elements that rank 0 trains.
    """

    world: int
    trained_parameters_rank0: int
    device: str
    peak_memory_bytes: int


@dataclass(frozen=True, config=STRICT)
class Done:
    """A verb that has nothing to report."""


@dataclass(frozen=True, config=STRICT)
class Saved:
    """files: relative to the folder that was asked for."""

    files: tuple[str, ...]


@dataclass(frozen=True, config=STRICT)
class Save(Request[Saved]):
    """Write a step's folder: optimizer state, and adapter or model."""

    verb: ClassVar[str] = "save"
    answer: ClassVar[type[Saved]] = Saved
    out: Path


@dataclass(frozen=True, config=STRICT)
class Trained:
    """files: as in `Saved`; empty where nothing was written."""

    metrics: dict[str, float]
    files: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class TrainStep(Request[Trained]):
    """Train on a packed batch.

    reference: a step folder, needed if and only if kl_coef > 0.
    out: as for `Save`; None writes no files, and `Save` is to follow.
    logprobs: file for the batch's log-probabilities before the step, `logprobs_RS`; None: not
        written.
    """

    verb: ClassVar[str] = "train_step"
    answer: ClassVar[type[Trained]] = Trained
    batch: Path
    config: TrainConfig
    out: Path | None
    reference: Path | None = None
    logprobs: Path | None = None


@dataclass(frozen=True, config=STRICT)
class Scored:
    """rows: of the packed batch.
    expert_choices_differ: with replayed experts, the share of choices that the live router would
        not have made.
    """

    rows: int
    expert_choices_differ: float | None = None


@dataclass(frozen=True, config=STRICT)
class Score(Request[Scored]):
    """Write `out`: logprobs_RS, float32, NaN where nothing is predicted. With top = C also top_RSC,
    int32, the C most likely ids there, and top_logprobs_RSC, float32, at temperature 1.
    """

    verb: ClassVar[str] = "score"
    answer: ClassVar[type[Scored]] = Scored
    batch: Path
    out: Path
    top: int = 0


@dataclass(frozen=True, config=STRICT)
class Loaded:
    """updates: optimizer steps until then."""

    updates: int


@dataclass(frozen=True, config=STRICT)
class Load(Request[Loaded]):
    """Take over a published step's weights and optimizer state."""

    verb: ClassVar[str] = "load"
    answer: ClassVar[type[Loaded]] = Loaded
    step_dir: Path


@dataclass(frozen=True, config=STRICT)
class StartFrom(Request[Done]):
    """Take over the values of a PEFT adapter, of the same rank, alpha and targets as the trainer's.
    The optimizer's state stays.
    """

    verb: ClassVar[str] = "start_from"
    answer: ClassVar[type[Done]] = Done
    adapter: Path


@dataclass(frozen=True, config=STRICT)
class SyncReport:
    """The measurements of one sync. Seconds by the wall clock; `pause_s` is the server's own
    figure.

    phases: seconds of each phase. On this side: "prepare" (the server lets its workers begin),
        "send" (buckets are filled and queued), "flush" (the last has left, digests are read). In
        the server: "receive" (waiting for the last bucket), then "load" and "verify" (reading the
        slot back), or "swap" (with reading the weights back).
    policy: "staged" or "streamed".
    path: how the weights got into the model: "direct" (planned copies), "load_weights", or
        "adapter".
    compared: whether the server could compare the live weights with those sent; they were the same,
        or there is no report.
    """

    version: str
    nbytes: int
    transfer_s: float
    commit_s: float
    pause_s: float
    policy: str
    path: str
    compared: bool
    phases: dict[str, float]


@dataclass(frozen=True, config=STRICT)
class SyncWeights(Request[SyncReport]):
    """The server serves the (merged) weights as `version`; after an error it holds what it held
    before.

    transport: a name of `lockstep_wire.transports`, or "disk:FOLDER".
    deadline_s: of every wait for the server.
    api_key: the server's token.
    others: addresses of the run's other servers; connections to any server beside these end.
    """

    verb: ClassVar[str] = "sync"
    answer: ClassVar[type[SyncReport]] = SyncReport
    secrets: ClassVar[tuple[str, ...]] = ("api_key",)
    root_url: str
    version: str
    transport: str
    deadline_s: float
    api_key: str = dataclasses.field(default="", repr=False)
    others: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class SyncAdapter(Request[SyncReport]):
    """The server serves the adapter, from memory, as model `version`, beside what it serves. Fields
    as in `SyncWeights`.
    """

    verb: ClassVar[str] = "sync_adapter"
    answer: ClassVar[type[SyncReport]] = SyncReport
    secrets: ClassVar[tuple[str, ...]] = ("api_key",)
    root_url: str
    version: str
    transport: str
    deadline_s: float
    api_key: str = dataclasses.field(default="", repr=False)
    others: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class Moved:
    """nbytes: that moved between device and host."""

    nbytes: int


@dataclass(frozen=True, config=STRICT)
class Offload(Request[Moved]):
    """Memory of the device to the host. `Save` works on from there; with keep_weights `Score` and
    the syncs do too.
    """

    verb: ClassVar[str] = "offload"
    answer: ClassVar[type[Moved]] = Moved
    keep_weights: bool = False


@dataclass(frozen=True, config=STRICT)
class Onload(Request[Moved]):
    """The reverse of `Offload`."""

    verb: ClassVar[str] = "onload"
    answer: ClassVar[type[Moved]] = Moved


@dataclass(frozen=True, config=STRICT)
class Release(Request[Done]):
    """Return torch's cached memory to the device (`torch.cuda.empty_cache`)."""

    verb: ClassVar[str] = "release"
    answer: ClassVar[type[Done]] = Done


@dataclass(frozen=True, config=STRICT)
class MemoryReport:
    """Bytes of rank 0.

    device_free: of the rank that has least.

    device_storages: of weights and optimizer on the device.
    host_copies: of the same on the host.
    allocated, reserved: torch's own figures, 0 without a GPU.
    device_free, device_total: of the device; total is 0 without a GPU.
    resident: what the process holds of the host's memory.
    """

    device_storages: int
    host_copies: int
    allocated: int
    reserved: int
    device_free: int
    device_total: int
    resident: int


@dataclass(frozen=True, config=STRICT)
class Memory(Request[MemoryReport]):
    """Ask for a `MemoryReport`."""

    verb: ClassVar[str] = "memory"
    answer: ClassVar[type[MemoryReport]] = MemoryReport


@dataclass(frozen=True, config=STRICT)
class Shutdown(Request[Done]):
    """End every rank."""

    verb: ClassVar[str] = "shutdown"
    answer: ClassVar[type[Done]] = Done


REQUESTS: dict[str, type[Request[Any]]] = {
    kind.verb: kind
    for kind in (
        TrainStep,
        Score,
        Load,
        StartFrom,
        Save,
        SyncWeights,
        SyncAdapter,
        Offload,
        Onload,
        Release,
        Memory,
        Shutdown,
    )
}
"""By verb."""

SCORING = frozenset({"score", "memory", "offload", "onload", "release"})
"""Verbs of a trainer that does not train."""


def to_json(message: Any) -> dict[str, Any]:
    """A message's fields as JSON."""
    return TypeAdapter(type(message)).dump_python(message, mode="json")


def from_json(kind: type[T], raw: Mapping[str, Any], where: str) -> T:
    """The message with these fields. Raises ConfigError, one line that begins with `where`, for a
    field that is unknown or wrong.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(raw))
    except ValidationError as error:
        raise ConfigError(describe(error, kind, where)) from None


def split_secrets(request: Request[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A request's fields for all ranks, and those for rank 0 alone."""
    fields = to_json(request)
    secret = {name: fields.pop(name) for name in request.secrets}
    return fields, secret
