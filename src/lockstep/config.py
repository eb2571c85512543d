"""Every setting a user can make: frozen, documented with its unit, and refused when unknown, out of range, or without
effect.
"""

from __future__ import annotations

import tomllib
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lockstep.config_messages import describe
from lockstep.errors import ConfigError

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""LoRA ranks that vLLM serves without padding."""

_CLIP_DEFAULTS = {"cispo": (1.0, 4.0), "ppo": (0.2, 0.2), "gspo": (3e-4, 4e-4)}
_DUAL_CLIP_DEFAULTS = {"cispo": float("inf"), "ppo": 3.0, "gspo": float("inf")}
_OLD_DEFAULTS: dict[str, Literal["sampling", "trainer"]] = {"cispo": "sampling", "ppo": "sampling", "gspo": "trainer"}
_WEIGHT_DEFAULTS: dict[str, Literal["token", "sequence"]] = {"cispo": "token", "ppo": "token", "gspo": "sequence"}
_CORRECTION_DEFAULTS: dict[str, tuple[float, float]] = {
    "truncated": (0.0, 2.0),
    "masked": (0.0, 2.0),
    "icepop": (0.5, 5.0),
}

Schema = TypeVar("Schema", bound=BaseModel)


_building: ContextVar[bool] = ContextVar("lockstep_config_building", default=False)


class Config(BaseModel):
    """Base of all configs: frozen, unknown keys refused, and every error one line (ConfigError)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **settings: Any):
        if _building.get():  # a part of a larger config: the outermost one tells, with the whole path of the setting
            super().__init__(**settings)
            return
        token = _building.set(True)
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(describe(error, type(self), type(self).__name__)) from None
        finally:
            _building.reset(token)


class LoraConfig(Config):
    """Low-rank adapters on the linear layers: W x + (alpha / rank) B A x."""

    rank: int = Field(default=16, description=f"rank of A and B; one of {', '.join(map(str, SERVED_RANKS))}")
    alpha: float = Field(default=32, gt=0, description="scale: the delta is (alpha / rank) B A")
    target_modules: tuple[str, ...] | None = Field(
        default=None,
        description="names of the linear layers to adapt, such as q_proj; None or all-linear: every linear layer of the family",
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _every_layer(cls, targets: Any) -> Any:
        return None if targets in ("all-linear", ["all-linear"], ("all-linear",)) else targets

    @field_validator("rank")
    @classmethod
    def _served(cls, rank: int) -> int:
        if rank not in SERVED_RANKS:
            raise ValueError(f"must be one of {', '.join(map(str, SERVED_RANKS))} (what vLLM serves)")
        return rank

    @field_validator("target_modules")
    @classmethod
    def _some_targets(cls, targets: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if targets is not None and (not targets or len(set(targets)) != len(targets)):
            raise ValueError("must name at least one layer, each once; leave it out for the family's default")
        return targets


class Placement(Config):
    """Which GPUs of this machine train and which serve. The same list in both: shared mode, the server sleeps while
    training. "cpu" in both: shared mode without a GPU, to try it out.
    """

    trainer: tuple[int, ...] | Literal["cpu"] = Field(description="GPU numbers of the trainer, such as [0]; or 'cpu'")
    inference: tuple[int, ...] | Literal["cpu"] = Field(description="GPU numbers of the server, such as [1]; or 'cpu'")

    @field_validator("trainer", "inference")
    @classmethod
    def _gpu_numbers(cls, gpus: tuple[int, ...] | Literal["cpu"]) -> tuple[int, ...] | Literal["cpu"]:
        if gpus != "cpu" and (not gpus or min(gpus) < 0 or len(set(gpus)) != len(gpus)):
            raise ValueError("must name at least one GPU, each once, counted from 0")
        return gpus

    @model_validator(mode="after")
    def _apart_or_shared(self) -> Placement:
        if "cpu" in (self.trainer, self.inference):
            if self.trainer != self.inference:
                raise ValueError("'cpu' for one of trainer and inference only: give it for both, or give both GPUs")
            return self
        common = set(self.trainer) & set(self.inference)
        if common and set(self.trainer) != set(self.inference):
            raise ValueError(
                f"trainer and inference share GPU {sorted(common)[0]} but not all: give them the same GPUs (shared) or "
                "none in common"
            )
        return self

    @property
    def shared(self) -> bool:
        """True when trainer and server take turns on the same devices."""
        return set(self.trainer) == set(self.inference)


class Parallel(Config):
    """How the trainer is spread over processes: tensor x pipeline x data x context of them."""

    tensor: int = Field(
        default=1, gt=0, description="tensor parallel size: each matrix is split over this many processes"
    )
    pipeline: int = Field(
        default=1, gt=0, description="pipeline parallel size: the layers are split over this many stages"
    )
    expert: int = Field(
        default=1, gt=0, description="expert parallel size: whole experts are split (mixture-of-experts only)"
    )
    expert_tensor: int = Field(
        default=1, gt=0, description="tensor parallel size inside an expert (mixture-of-experts only)"
    )
    data: int = Field(default=1, gt=0, description="data parallel size: rows of a batch are split")
    context: int = Field(default=1, gt=0, description="context parallel size: tokens of a row are split")
    sequence: bool | None = Field(
        default=None, description="sequence parallel between the tensor parallel layers; None: on when tensor > 1"
    )

    @model_validator(mode="after")
    def _fits(self) -> Parallel:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence = true has no effect with tensor = 1: leave it out, or set tensor to 2 or more")
        shared = self.tensor * self.data * self.context
        if shared % (self.expert * self.expert_tensor):
            raise ValueError(
                f"expert x expert_tensor = {self.expert * self.expert_tensor} must divide tensor x data x "
                f"context = {shared}"
            )
        return self

    @property
    def processes(self) -> int:
        """How many trainer processes that makes."""
        return self.tensor * self.pipeline * self.replicas

    @property
    def replicas(self) -> int:
        """Processes with the same weights outside of the experts."""
        return self.data * self.context

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor > 1 if self.sequence is None else self.sequence


class TrainConfig(Config):
    """One training step: from groups of trajectories to the next version."""

    learning_rate: float = Field(default=1e-5, gt=0, description="AdamW step size, constant within the step")
    loss: Literal["cispo", "ppo", "gspo"] = Field(
        default="cispo",
        description="cispo: clipped importance weight times log-probability; ppo: clipped surrogate per token; gspo: "
        "per sequence",
    )
    clip_low: float | None = Field(
        default=None,
        ge=0,
        description="the importance ratio is clipped below 1 - clip_low; None: 1.0 (cispo), 0.2 (ppo), 3e-4 (gspo)",
    )
    clip_high: float | None = Field(
        default=None,
        ge=0,
        description="the importance ratio is clipped above 1 + clip_high; None: 4.0 (cispo), 0.2 (ppo), 4e-4 (gspo)",
    )
    clip_dual: float | None = Field(
        default=None,
        gt=1,
        description="ppo, negative advantages: the loss of a token stops growing at this ratio (arXiv 1912.09729); "
        "None: 3.0 (ppo)",
    )
    kl_coef: float = Field(
        default=0.0, ge=0, description="weight of the KL penalty towards the reference step; 0: none"
    )
    kl_reference_step: int | None = Field(
        default=None, ge=0, description="the step the KL penalty pulls towards; None: step 0. Needs kl_coef > 0"
    )
    advantage_normalization: Literal["std", "none"] = Field(
        default="std",
        description="std: reward minus the group's mean, over the group's standard deviation; none: no division",
    )
    reward_eps: float = Field(
        default=1e-5,
        ge=0,
        lt=1,
        description="rewards of a group that differ by at most this share of its largest |reward| are equal: no signal",
    )
    token_normalization: Literal["token", "sequence"] | None = Field(
        default=None,
        description="token: every trained token counts the same; sequence: every trajectory does; None: token "
        "(cispo, ppo), sequence (gspo)",
    )
    old_logprobs: Literal["sampling", "trainer"] | None = Field(
        default=None,
        description="what the importance ratio divides by: the server's log-probabilities, or the trainer's own "
        "before the step; None: sampling (cispo, ppo), trainer (gspo)",
    )
    importance_correction: Literal["truncated", "masked", "icepop"] | None = Field(
        default=None,
        description="weight trainer/server per token, for what the two compute differently: capped (truncated), zero "
        "above the cap (masked), or zero outside [floor, cap] (icepop). Needs old_logprobs = trainer",
    )
    importance_cap: float | None = Field(
        default=None, gt=0, description="cap of that weight; None: 2.0 (truncated, masked), 5.0 (icepop)"
    )
    importance_floor: float | None = Field(
        default=None, ge=0, description="floor of that weight, icepop only; None: 0.5"
    )
    minibatches: int = Field(default=1, gt=0, description="optimizer steps per batch; its rows are split evenly")
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="clip the gradient's global L2 norm; None: never"
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.99), description="AdamW moment decays, each in [0, 1)")
    eps: float = Field(default=1e-8, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW decoupled weight decay, of matrices only")
    row_length: int | None = Field(
        default=None,
        gt=0,
        description="tokens per packed row; None: fits the batch (its longest sequence, at least 4096 if there are "
        "that many tokens)",
    )
    share_prefixes: bool = Field(
        default=True, description="compute tokens that sequences share once (prefix-tree packing)"
    )
    over_length: Literal["error", "truncate", "drop"] = Field(
        default="error", description="what to do with a sequence longer than row_length"
    )
    max_steps_off_policy: int = Field(
        default=0, ge=0, description="refuse rollouts sampled more than this many steps before the current one"
    )
    max_mismatch: float | None = Field(
        default=0.2,
        gt=0,
        description="refuse the step if the mean |log-probability difference| between server and trainer exceeds "
        "this, in nats; tokens that an earlier step sampled don't count, since the policy has changed under them; "
        "None: never",
    )
    max_token_mismatch: float | None = Field(
        default=None,
        gt=0,
        description="refuse the step if the |log-probability difference| of any one of these tokens exceeds this, in "
        "nats, and the rounding of an fp32 log-probability of its size; None: never",
    )
    seed: int = Field(default=0, ge=0, description="order of rows and ties in packing")

    @field_validator("betas")
    @classmethod
    def _decays(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("must each be in [0, 1)")
        return betas

    @model_validator(mode="after")
    def _no_silent_settings(self) -> TrainConfig:
        if self.kl_reference_step is not None and self.kl_coef == 0:
            raise ValueError("kl_reference_step has no effect with kl_coef = 0: set kl_coef, or leave the step out")
        if self.over_length != "error" and self.row_length is None:
            raise ValueError(
                f"over_length = {self.over_length} has no effect without row_length: rows grow to the longest sequence"
            )
        return self

    @model_validator(mode="after")
    def _clips_that_work(self) -> TrainConfig:
        if self.clip_low is not None and self.clip_low > 1:
            raise ValueError(f"clip_low = {self.clip_low} has no effect above 1, ratios are never negative: use 1.0")
        if self.clip_dual is not None:
            if self.loss != "ppo":
                raise ValueError(f"clip_dual has no effect with loss = {self.loss}: leave it out, or set loss = ppo")
            if self.clip_dual <= self.clip_range[1]:
                raise ValueError(
                    f"clip_dual = {self.clip_dual} must be above 1 + clip_high = {self.clip_range[1]:g}: a lower one "
                    "cuts what the clip lets through"
                )
        if self.loss == "gspo" and self.divides_by == "sampling" and None in (self.clip_low, self.clip_high):
            raise ValueError(
                "loss = gspo with old_logprobs = sampling clips rounding: server and trainer differ by more than the "
                "default clips, 3e-4 and 4e-4. Leave old_logprobs out, or set both clip_low and clip_high"
            )
        return self

    @model_validator(mode="after")
    def _corrections_that_work(self) -> TrainConfig:
        if self.importance_correction is None:
            for name in ("importance_cap", "importance_floor"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no effect without importance_correction: set it, or leave {name} out")
            if self.max_steps_off_policy > 0 and self.divides_by == "trainer":
                raise ValueError(
                    f"max_steps_off_policy = {self.max_steps_off_policy} with old_logprobs = trainer trains on older "
                    f"rollouts as if they were new (loss = {self.loss}): set importance_correction, or "
                    "old_logprobs = sampling"
                )
        elif self.divides_by != "trainer":
            raise ValueError(
                "importance_correction needs old_logprobs = trainer: with sampling the ratio already divides by "
                "the server's"
            )
        if self.importance_floor is not None and self.importance_correction != "icepop":
            raise ValueError(
                f"importance_floor has no effect with importance_correction = {self.importance_correction}"
            )
        floor, cap = self.importance_bounds
        if floor > cap:
            raise ValueError(f"importance_floor = {floor} is above importance_cap = {cap}: every token would be masked")
        return self

    @property
    def divides_by(self) -> Literal["sampling", "trainer"]:
        """`old_logprobs` with the loss's default filled in."""
        return self.old_logprobs or _OLD_DEFAULTS[self.loss]

    @property
    def weighs_by(self) -> Literal["token", "sequence"]:
        """`token_normalization` with the loss's default filled in."""
        return self.token_normalization or _WEIGHT_DEFAULTS[self.loss]

    @property
    def dual_clip(self) -> float:
        """`clip_dual` with the loss's default filled in; inf for a loss without one."""
        return _DUAL_CLIP_DEFAULTS[self.loss] if self.clip_dual is None else self.clip_dual

    @property
    def clip_range(self) -> tuple[float, float]:
        """(1 - clip_low, 1 + clip_high) with the loss's defaults filled in."""
        low, high = _CLIP_DEFAULTS[self.loss]
        low = low if self.clip_low is None else self.clip_low
        return 1 - low, 1 + (high if self.clip_high is None else self.clip_high)

    @property
    def importance_bounds(self) -> tuple[float, float]:
        """(floor, cap) of the importance correction with its defaults filled in; (0, inf) without one."""
        if self.importance_correction is None:
            return 0.0, float("inf")
        floor, cap = _CORRECTION_DEFAULTS[self.importance_correction]
        return (
            floor if self.importance_floor is None else self.importance_floor,
            cap if self.importance_cap is None else self.importance_cap,
        )

    @property
    def reference_step(self) -> int | None:
        """The step the KL penalty pulls towards; None without a penalty."""
        return (self.kl_reference_step or 0) if self.kl_coef > 0 else None


@dataclass(frozen=True)
class TrainResult:
    """What a training step gave. `metrics` are plain floats; `checkpoint_path` is the immutable folder of the new step."""

    step: int
    metrics: dict[str, float]
    checkpoint_path: Path


def unsupported(setting: str, value: object, backend: str, why: str) -> ConfigError:
    """The error for a valid setting that `backend` can't honour: `raise unsupported("loss", "gspo", "TinkerBackend",
    "...")`.
    """
    return ConfigError(f"{backend} does not support {setting} = {value!r}: {why}")


def load_toml(path: str | Path, schema: type[Schema]) -> Schema:
    """Read a TOML file into `schema`.

    Raises ConfigError, one line that names the file and the setting: file missing, not TOML, unknown key (with close
    matches), bad value.
    """
    path = Path(path).expanduser()
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except IsADirectoryError:
        raise ConfigError(f"config file {path} is a folder: give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not TOML: {error}") from None
    token = _building.set(True)
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise ConfigError(describe(error, schema, str(path))) from None
    finally:
        _building.reset(token)
