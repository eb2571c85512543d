"""The file that `lockstep train` reads: TOML, checked key by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from lockstep.config.base import Config, load_toml
from lockstep.config.lora import LoraConfig
from lockstep.config.megatron import MegatronConfig
from lockstep.config.messages import describe
from lockstep.config.pipeline import PipelineConfig
from lockstep.config.sft import SFTConfig
from lockstep.config.train import TrainConfig
from lockstep_wire.sampling import LEAST_TEMPERATURE


class ModelSection(Config):
    """[model]: what is trained."""

    name: str = Field(description="name of the model; step 3 is served as NAME@3")
    project: str = Field(description="groups runs: files go to PATH/PROJECT/NAME")
    base_model: str = Field(description="a Hugging Face id, or a folder with config.json and safetensors files")
    lora: LoraConfig | None = Field(
        default_factory=LoraConfig,
        description="the adapter's shape; false trains all weights (with rollout_weights_mode = merged)",
    )

    @field_validator("lora", mode="before")
    @classmethod
    def _or_all_weights(cls, lora: Any) -> Any:
        if lora is True:
            raise ValueError("must be a table such as { rank = 16 }, or false to train all weights")
        return None if lora is False else lora  # TOML has no none


class TaskSection(Config):
    """[task]: what is rolled out."""

    file: str | None = Field(
        default=None, description="Python file with scenarios() and rollout(), relative to this config"
    )
    environment: str | None = Field(
        default=None,
        description="in place of a file: reasoning_gym:DATA_SET, jsonl:FILE, verifiers:TASKSET or harbor:FOLDER (how-to/environments.md)",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="what the environment takes, a table of its own")
    steps: int = Field(gt=0, description="the run ends when the model has this many steps")
    groups_per_step: int = Field(default=8, gt=0, description="scenarios per training step")
    group_size: int = Field(default=8, ge=2, description="tries per scenario; their mean reward is the baseline")
    refill_groups: int = Field(
        default=0,
        ge=0,
        description="further scenarios that a step may draw, at most, where the rewards of a group are all equal: groups whose rewards "
        "differ take the place of such groups (dynamic sampling); 0: none",
    )
    temperature: float = Field(
        default=1.0,
        ge=LEAST_TEMPERATURE,
        description="of the sampling of training rollouts; 0.01, vLLM's least, or more",
    )
    max_exceptions: int | float = Field(
        default=0.1,
        ge=0,
        description="failed rollouts tolerated per step and per evaluation: a count, or a fraction below 1, rounded up but never all",
    )
    rollout_timeout_s: float = Field(default=1800.0, gt=0, description="seconds after which a rollout counts as failed")
    evaluate_every: int = Field(default=1, gt=0, description="measure the greedy reward every so many steps")
    evaluate_scenarios: int = Field(default=64, gt=0, description="scenarios of an evaluation, at most")
    evaluate_samples: int = Field(
        default=0,
        ge=0,
        description="sampled tries per scenario of an evaluation, beside the greedy one, for pass@k; 0: none",
    )
    pass_reward: float = Field(
        default=1.0, description="reward from which a sampled try of an evaluation counts as passed"
    )
    evaluate_concurrent: int = Field(default=64, gt=0, description="rollouts of an evaluation at once")
    stop_at_reward: float | None = Field(default=None, description="end early when the greedy reward reaches this")
    seed: int = Field(
        default=0, ge=0, description="of the scenarios' order, the adapter's initial values and the sampling"
    )

    @model_validator(mode="after")
    def _samples_that_pass(self) -> TaskSection:
        if "pass_reward" in self.model_fields_set and not self.evaluate_samples:
            raise ValueError("pass_reward has no effect without evaluate_samples: set it, or leave pass_reward out")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> TaskSection:
        if (self.file is None) == (self.environment is None):
            raise ValueError("set file (Python with scenarios() and rollout()) or environment, and not both")
        if self.options and self.environment is None:
            raise ValueError("options are an environment's: set environment, or leave them out")
        return self

    @field_validator("max_exceptions")
    @classmethod
    def _count_or_fraction(cls, allowed: int | float) -> int | float:
        if allowed >= 1 and allowed != int(allowed):
            raise ValueError("must be a whole number, or a fraction below 1")
        return allowed


class TinySection(Config):
    """[tiny]: what `--tiny` changes, so that the run needs no GPU and no download."""

    family: str = Field(default="qwen3", description="one of those that `lockstep tiny` makes")
    config: dict[str, int | float | bool | str] = Field(
        default={"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128},
        description="fields of the model's config.json, as in `lockstep tiny --set`",
    )
    warmup_steps: int = Field(default=100, ge=0, description="supervised steps on the task's demonstrations")
    train: dict[str, Any] = Field(default_factory=dict, description="settings that replace those of [train]")

    @field_validator("family")
    @classmethod
    def _known(cls, family: str) -> str:
        from lockstep.models.tiny.write import tiny_models

        if family not in tiny_models():
            raise ValueError(f"must be one of {', '.join(tiny_models())}")
        return family


class SFTSection(SFTConfig):
    """[sft]: what `lockstep sft` learns from."""

    data: Path = Field(
        description='JSONL file, relative to this config: a line is {"messages": [...], "tools": [...] or nothing}'
    )
    epochs: float = Field(default=1.0, gt=0, description="passes over the data; the run's first steps are these")
    batch_size: int = Field(default=16, gt=0, description="chats per step")


class RunFile(Config):
    """A whole run."""

    mode: Literal["synchronous", "pipeline"] = Field(
        default="synchronous",
        description="synchronous: rollouts and training take turns; pipeline: rollouts go on while the trainer works, as far as "
        "[train] max_steps_off_policy allows",
    )
    model: ModelSection
    backend: MegatronConfig = Field(default_factory=MegatronConfig)
    task: TaskSection
    train: TrainConfig = Field(default_factory=TrainConfig)
    pipeline: PipelineConfig = Field(default_factory=PipelineConfig)
    tiny: TinySection = Field(default_factory=TinySection)
    sft: SFTSection | None = Field(default=None, description="read by `lockstep sft` alone")

    @model_validator(mode="after")
    def _one_seed(self) -> RunFile:
        if "seed" in self.backend.model_fields_set:
            raise ValueError("[backend] seed: set seed in [task], which is that of the backend, too")
        return self

    @model_validator(mode="after")
    def _pipeline_that_works(self) -> RunFile:
        if self.mode == "synchronous":
            if self.pipeline.model_fields_set:
                raise ValueError("[pipeline] has no effect without mode = pipeline: set mode at the file's top")
            return self
        if self.task.refill_groups:
            raise ValueError(
                "[task] refill_groups has no effect in mode = pipeline: leave it out, or set mode = synchronous"
            )
        for train in (self.train, self.tiny_train_config()):
            self.pipeline.limits(train.max_steps_off_policy, self.task.groups_per_step)
        return self

    @model_validator(mode="after")
    def _tiny_trains(self) -> RunFile:
        try:
            self.tiny_train_config()
        except ValidationError as error:
            raise ValueError(describe(error, TrainConfig, "[tiny.train]")) from None
        return self

    @model_validator(mode="after")
    def _minibatches_can_be_filled(self) -> RunFile:
        trajectories = self.task.groups_per_step * self.task.group_size
        for where, config in (("train", self.train), ("tiny.train", self.tiny_train_config())):
            if config.minibatches * self.backend.parallel.data > trajectories:
                raise ValueError(
                    f"{where}.minibatches = {config.minibatches} (x data = {self.backend.parallel.data}) is more than the "
                    f"{trajectories} trajectories of a step: use fewer, or larger groups_per_step or group_size"
                )
        return self

    def tiny_train_config(self) -> TrainConfig:
        """[train] with the changes of [tiny.train]."""
        return TrainConfig(**self.train.model_dump(exclude_unset=True) | self.tiny.train)

    def train_config(self, tiny: bool) -> TrainConfig:
        """[train], or that of a tiny model, with the length of its schedule."""
        return (self.tiny_train_config() if tiny else self.train).over(self.task.steps)


class SFTFile(Config):
    """The part of a run's file that `lockstep sft` reads. What `lockstep train` reads may stand
    beside it: one run learns from chats first, and from rewards then.
    """

    model: ModelSection
    backend: MegatronConfig = Field(default_factory=MegatronConfig)
    sft: SFTSection
    task: TaskSection | None = Field(
        default=None, description="read by `lockstep train`; its seed is this command's, too"
    )

    @model_validator(mode="before")
    @classmethod
    def _others_are_for_train(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        others = [name for name in data if name in RunFile.model_fields and name not in cls.model_fields]
        if others and "task" not in data:
            raise ValueError(
                f"{others[0]} has no effect without [task]: `lockstep sft` reads {', '.join(cls.model_fields)}"
            )
        return {
            name: value for name, value in data.items() if name not in RunFile.model_fields or name in cls.model_fields
        }

    @model_validator(mode="after")
    def _one_seed(self) -> SFTFile:
        if "seed" in self.backend.model_fields_set:
            raise ValueError("[backend] seed: set seed in [task], or else in [sft], which is that of the backend, too")
        return self

    @property
    def seed(self) -> int:
        """Of the backend: the same for both commands."""
        return self.task.seed if self.task else self.sft.seed


def load_sft_file(path: Path) -> SFTFile:
    """The same file for `lockstep sft`, checked as a whole. Raises ConfigError likewise."""
    file = load_toml(path, SFTFile)
    if file.task is not None:
        load_run_file(path)
    return file


def load_run_file(path: Path) -> RunFile:
    """Read a run's TOML file. Raises ConfigError with the first thing that is wrong, in one line."""
    return load_toml(path, RunFile)
