"""The stages of `lockstep validate`, as data: what each shows, what it needs, and its deadline.

A stage's module has `run(request) -> Outcome`, awaited where it is a coroutine. It is imported in
the stage's own process only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.config.messages import unknown
from lockstep.errors import ConfigError


@dataclass(frozen=True)
class StageSpec:
    """One stage.

    module: below `lockstep.validate`.
    server: it starts vLLM.
    deadline_s: of the stage's process on a CPU, seconds.
    moe_only: it says nothing about a dense model.
    """

    name: str
    module: str
    shows: str
    deadline_s: float
    server: bool = False
    moe_only: bool = False


STAGES: tuple[StageSpec, ...] = (
    StageSpec(
        "dependency_resolution",
        "stages.files.dependency_resolution",
        "every installed package is at least as new as the family needs",
        60,
    ),
    StageSpec(
        "architecture_discovery",
        "stages.files.architecture_discovery",
        "every field of the model's config is read or known to have no effect",
        60,
    ),
    StageSpec(
        "tokenizer_and_template",
        "stages.files.tokenizer_and_template",
        "tokens, end of turn and chat template of trainer and server agree",
        120,
    ),
    StageSpec(
        "hf_parity",
        "stages.engine.hf_parity",
        "every module, the loss, all gradients and one update are Hugging Face's",
        600,
    ),
    StageSpec(
        "weight_round_trip",
        "stages.engine.weight_round_trip",
        "a checkpoint that is read and written at any parallel sizes keeps its bytes",
        300,
    ),
    StageSpec(
        "packing_invariance",
        "stages.engine.packing_invariance",
        "packed rows give the log-probabilities and gradients of single sequences",
        300,
    ),
    StageSpec(
        "lora_coverage",
        "stages.engine.lora_coverage",
        "every LoRA target is wrapped, trained, exported, and has its effect in trainer and server",
        900,
        server=True,
    ),
    StageSpec(
        "correctness",
        "stages.engine.correctness",
        "every parallel layout gives the log-probabilities, gradients and updates of one rank",
        900,
    ),
    StageSpec(
        "sensitivity",
        "faults.sensitivity",
        "planted faults are detected by the stages that are to detect them",
        900,
    ),
    StageSpec(
        "expert_replay",
        "stages.engine.expert_replay",
        "the trainer computes with the experts that another program recorded, each record once",
        300,
        moe_only=True,
    ),
    StageSpec(
        "resume",
        "stages.engine.resume",
        "a step that another trainer loads goes on to the same bytes",
        300,
    ),
    StageSpec(
        "native_vllm_lora",
        "stages.server.native_vllm_lora",
        "each step's adapter has the effect in the server that it has in Hugging Face",
        900,
        server=True,
    ),
    StageSpec(
        "merged_vllm_serving",
        "stages.server.merged_vllm_serving",
        "after each sync the server answers as Hugging Face with the step's weights",
        900,
        server=True,
    ),
    StageSpec(
        "chat_template_rollout",
        "stages.server.chat_template_rollout",
        "the server's prompts are the trainer's, and a conversation keeps its sampled ids",
        900,
        server=True,
    ),
    StageSpec(
        "yes_no_trainability",
        "stages.server.yes_no_trainability",
        "a reward on the first word is learnt",
        1200,
        server=True,
    ),
    StageSpec(
        "length_trainability",
        "stages.server.length_trainability",
        "a reward on the length of replies is learnt",
        1200,
        server=True,
    ),
    StageSpec(
        "train_inf_mismatch",
        "stages.server.train_inf_mismatch",
        "the trainer gives tokens the log-probabilities that the server sampled them with",
        900,
        server=True,
    ),
    StageSpec(
        "throughput",
        "stages.server.throughput",
        "tokens a second of trainer, server and loop, with every token trained and nothing compiled anew",
        900,
        server=True,
    ),
)


def stage_names() -> tuple[str, ...]:
    return tuple(stage.name for stage in STAGES)


def stage_named(name: str) -> StageSpec:
    """Raises ConfigError for a stage that does not exist."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise ConfigError(unknown(name, stage_names(), "lockstep validate"))


def selected(stages: Sequence[str], skip: Sequence[str]) -> tuple[StageSpec, ...]:
    """The stages to run, in the registry's order. No `stages`: all but `skip`.

    Raises ConfigError for an unknown name, and when nothing is left.
    """
    wanted = {stage_named(name).name for name in stages} or set(stage_names())
    wanted -= {stage_named(name).name for name in skip}
    if not wanted:
        raise ConfigError(f"no stage is left to run: choose from {', '.join(stage_names())}")
    return tuple(stage for stage in STAGES if stage.name in wanted)
