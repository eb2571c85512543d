"""`environment = "reasoning_gym:chain_sum"`: any data set of the package reasoning-gym, scored by its own function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lockstep.config.messages import unknown
from lockstep.errors import ConfigError
from lockstep.loop.environments.options import ReplyOptions, options_of
from lockstep.loop.environments.questions import Question, question_task
from lockstep.loop.task import Task

if TYPE_CHECKING:
    from lockstep.loop.run_file import TaskSection


class ReasoningGymOptions(ReplyOptions):
    """[task.options] of a reasoning-gym data set."""

    training_questions: int = Field(default=2000, gt=0, description="questions that are drawn for training")
    held_out_questions: int = Field(default=200, gt=0, description="questions that are evaluated, and never trained on")
    prompt_style: str = Field(
        default="default",
        description="which of reasoning-gym's instructions stands first, where system_prompt is not given",
    )
    answer_tag: str | None = Field(
        default="answer", description="the answer is what <TAG> holds; false scores the whole reply"
    )
    data_set: dict[str, Any] = Field(
        default_factory=dict, description="settings of the data set itself, such as min_terms"
    )


def task(name: str, section: TaskSection, folder: Path) -> Task:
    """The task of a data set. Questions follow from [task] seed, and no held-out question is among those of training."""
    del folder
    options = options_of(ReasoningGymOptions, section)
    gym = _package()
    if name not in gym.factory.DATASETS:
        raise ConfigError(unknown(name, gym.factory.DATASETS, "reasoning_gym"))
    prompts = gym.utils.SYSTEM_PROMPTS
    if options.system_prompt is None and options.prompt_style not in prompts:
        raise ConfigError(unknown(options.prompt_style, prompts, "[task.options] prompt_style"))
    instructions = prompts[options.prompt_style] if options.system_prompt is None else options.system_prompt

    def drawn(count: int, seed: int) -> dict[str, Question]:
        entries = _data_set(gym, name, options, count, seed)
        return {entry["question"]: _question(entry, instructions, options.answer_tag) for entry in entries}

    held_out = drawn(options.held_out_questions, 2 * section.seed + 1)
    training = drawn(options.training_questions, 2 * section.seed)
    kept = [question for text, question in training.items() if text not in held_out]
    if not kept:
        raise ConfigError(
            f"reasoning_gym:{name} draws the same questions for training as are held out: use fewer held_out_questions, "
            "or settings of data_set that allow more questions"
        )
    scorer = _data_set(gym, name, options, 1, 0)

    def score(text: str, entry: dict[str, Any]) -> float:
        tag = options.answer_tag
        answer = text if tag is None else gym.utils.extract_answer(text, tag_name=tag)
        return scorer.score_answer(answer=answer, entry=entry)

    return question_task(Path(f"reasoning_gym:{name}"), kept, list(held_out.values()), score, options.reply_tokens)


def _package() -> Any:
    try:
        import reasoning_gym
        import reasoning_gym.factory
        import reasoning_gym.utils
    except ModuleNotFoundError as error:
        if error.name != "reasoning_gym":
            raise
        raise ConfigError("this environment needs reasoning-gym: pip install lockstep-rl[reasoning-gym]") from None
    return reasoning_gym


def _data_set(gym: Any, name: str, options: ReasoningGymOptions, count: int, seed: int) -> Any:
    try:
        return gym.create_dataset(name, size=count, seed=seed, **options.data_set)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"[task.options] data_set: reasoning_gym:{name} refuses it: {error}") from None


def _question(entry: dict[str, Any], instructions: str, tag: str | None) -> Question:
    messages = [{"role": "system", "content": instructions}] if instructions else []
    messages.append({"role": "user", "content": entry["question"]})
    answer = entry["answer"]
    text = answer if isinstance(answer, str) else json.dumps(answer)
    shown = None if answer is None else (text if tag is None else f"<{tag}>{text}</{tag}>")
    return Question(messages, entry, shown)
