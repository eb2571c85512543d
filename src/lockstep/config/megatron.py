"""Settings of the Megatron backend: where and how trainer and server run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lockstep.config.base import Config


class Placement(Config):
    """The GPUs of this machine that train, and those that serve. The same list in both: colocated
    mode, the server sleeps while training. "cpu" in both: colocated mode without a GPU, to try it
    out.

    A list of lists for `inference`: several servers (replicas) share the rollouts, each on its GPUs.
    """

    trainer: tuple[int, ...] | Literal["cpu"] = Field(description="GPU numbers of the trainer, such as [0]; or 'cpu'")
    inference: tuple[int, ...] | tuple[tuple[int, ...], ...] | Literal["cpu"] = Field(
        description="GPU numbers of the server, such as [1]; a list for each of several servers, such as [[1], [2, 3]]; or 'cpu'"
    )

    @field_validator("trainer", "inference")
    @classmethod
    def _gpu_numbers(cls, gpus: Any) -> Any:
        lists = [gpu if isinstance(gpu, tuple) else (gpu,) for gpu in gpus if gpus != "cpu"]
        numbers = [number for numbers in lists for number in numbers]
        if gpus != "cpu" and (not all(lists) or not numbers or min(numbers) < 0 or len(set(numbers)) != len(numbers)):
            raise ValueError("must name at least one GPU, each once, counted from 0")
        return gpus

    @model_validator(mode="after")
    def _apart_or_shared(self) -> Placement:
        if "cpu" in (self.trainer, self.inference):
            if self.trainer != self.inference:
                raise ValueError("'cpu' for one of trainer and inference only: give it for both, or give both GPUs")
            return self
        serving = {number for server in self.servers for number in server}
        common = set(self.trainer) & serving
        if common and len(self.servers) > 1:
            raise ValueError(
                f"trainer and inference share GPU {sorted(common)[0]}: several servers need GPUs of their own"
            )
        if common and set(self.trainer) != serving:
            raise ValueError(
                f"trainer and inference share GPU {sorted(common)[0]} but not all: give them the same GPUs (shared) or "
                "none in common"
            )
        return self

    @property
    def colocated(self) -> bool:
        """True when trainer and server take turns on the same devices."""
        return self.trainer == "cpu" or set(self.trainer) == set(self.servers[0])

    @property
    def servers(self) -> tuple[tuple[int, ...], ...]:
        """The GPUs of each server; of a CPU's one server, none."""
        gpus: Any = () if self.inference == "cpu" else self.inference
        return gpus if gpus and isinstance(gpus[0], tuple) else (gpus,)


class Parallel(Config):
    """The distribution of the trainer over processes: tensor x pipeline x data x context of them."""

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
        ranks = self.tensor * self.data * self.context
        if ranks % (self.expert * self.expert_tensor):
            raise ValueError(
                f"expert x expert_tensor = {self.expert * self.expert_tensor} must divide tensor x data x "
                f"context = {ranks}"
            )
        return self

    @property
    def processes(self) -> int:
        """The number of trainer processes."""
        return self.tensor * self.pipeline * self.replicas

    @property
    def replicas(self) -> int:
        """Processes with the same weights outside of the experts."""
        return self.data * self.context

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor > 1 if self.sequence is None else self.sequence


WeightTransport = Literal["gloo", "nccl", "ipc", "disk"]


def fitting_transports(device: Literal["cpu", "cuda"], colocated: bool) -> tuple[WeightTransport, ...]:
    """The transports of `lockstep_wire.transports` that work between such a trainer and server, the
    best first.
    """
    return "gloo" if device == "cpu" else "ipc" if colocated else "nccl", "disk"


LEAST_CONTEXT = 49
"""Tokens of the shortest `max_model_len`: the text that verifies a step has to fit, and a shorter
one says little.
"""


class MegatronConfig(Config):
    """The settings of Megatron-Core and vLLM on this machine. Every setting has a default that runs
    on the machine at hand.
    """

    path: Path = Field(default=Path("runs"), description="folder that holds all runs, relative to the current folder")
    rollout_weights_mode: Literal["lora", "merged"] = Field(
        default="lora", description="how new weights reach the server: lora as an adapter, merged as its base weights"
    )
    placement: Placement | None = Field(
        default=None,
        description="GPU numbers of trainer and server; if not given, the CPU where there is no GPU, one GPU colocated, and else GPU "
        "0 and 1",
    )
    replicas: int | None = Field(
        default=None,
        ge=1,
        description="servers that share the rollouts: on the CPU, on one GPU each beside the trainer's, or on equal parts of "
        "placement.inference; 1 if not given, or as many as placement.inference has lists",
    )
    parallel: Parallel = Field(default_factory=Parallel, description="how the trainer is spread over processes")
    offload: bool | None = Field(
        default=None,
        description="colocated only: the trainer's weights and optimizer go to the host while the server serves; on, if not given. "
        "false keeps them on the GPU, which the server then has less of",
    )
    weight_transport: WeightTransport | None = Field(
        default=None,
        description="how weights and adapters travel from the trainer's memory to the server: disk, or what fits the placement if not "
        "given",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=LEAST_CONTEXT,
        description="longest sequence that the server accepts, in tokens; the model's positions if not given, as far as memory holds",
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None,
        description="of the weights; the checkpoint's if not given (bfloat16 for adapters on a GPU, whose kernels take nothing wider)",
    )
    recompute: bool | None = Field(
        default=None,
        description="keep only layer inputs and recompute the rest in the backward pass; as memory asks for it if not given",
    )
    numerics: Literal["fast", "exact"] = Field(
        default="fast",
        description="exact: on a CPU, fp64 on both sides; every token agrees to 1e-6 nats, or the step fails (docs/numerics.md)",
    )
    tool_call_parser: str | None = Field(
        default=None,
        description="vLLM's parser that turns the model's text into tool calls; the family's if not given, where tokenizer and chat "
        "template serve it: else requests with tools are refused",
    )
    server_args: tuple[str, ...] = Field(
        default=(),
        description="further arguments of vLLM's command line; they win over ours, but for those that the run decides itself, which "
        "are refused",
    )
    enable_expert_replay: bool = Field(
        default=True, description="mixture-of-experts only: train on the experts that the server used"
    )
    keep_newest: int = Field(
        default=3,
        ge=1,
        description="published steps that stay on disk: this many of the last ones, and those that the next settings name",
    )
    keep_best: str | None = Field(
        default="greedy_reward",
        description="the step with the highest value of this metric stays, too; none if no step has it",
    )
    keep_every: int | None = Field(
        default=None, ge=1, description="steps whose number is a multiple of this stay, too; 1: every step"
    )
    keep_optimizer_states: bool = Field(
        default=False,
        description="kept steps keep their optimizer's state, so that training can go on from each; false: from the newest only",
    )
    sinks: tuple[str, ...] = Field(
        default=(),
        description="where metrics go besides run.sqlite and metrics.jsonl: tensorboard, wandb, mlflow, trackio, or your own as "
        "module:function (docs/how-to/metrics.md)",
    )
    seed: int = Field(default=0, ge=0, description="of the adapter's initial values and the server's sampling")
    seed_requests: bool = Field(
        default=True,
        description="each request of a rollout has a seed that follows from its place in the run: a resumed run samples what an "
        "undisturbed one samples (docs/numerics.md says what it costs)",
    )

    @property
    def merged(self) -> bool:
        """The server holds the trained weights as its base model's, and no adapters."""
        return self.rollout_weights_mode == "merged"

    @property
    def exact(self) -> bool:
        """Trainer and server compute the fp32 weights in fp64."""
        return self.numerics == "exact"
