"""Sums and differences of two numbers, from reasoning-gym's chain_sum. A reply earns 1 if its last number is the answer."""

import re
from dataclasses import dataclass

import lockstep as ls
from lockstep.errors import ConfigError

REPLY_TOKENS = 24
TRAINING_SEED, HELD_OUT_SEED = 1, 2
TRAINING_QUESTIONS, HELD_OUT_QUESTIONS = 2000, 200


@dataclass(frozen=True)
class Question:
    """What is asked, and the number that is right."""

    text: str
    answer: str


def _questions(count: int, seed: int) -> list[Question]:
    try:
        from reasoning_gym import create_dataset
    except ModuleNotFoundError as error:
        if error.name != "reasoning_gym":
            raise
        raise ConfigError("the arithmetic task needs reasoning-gym: pip install lockstep-rl[examples]") from None
    shape = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    drawn = create_dataset("chain_sum", size=count, seed=seed, **shape)
    return [Question(entry["question"], entry["answer"]) for entry in drawn]


def scenarios() -> list[Question]:
    """Training questions, without those that are held out. Half have one digit, and come more than once for it."""
    held_out = set(evaluation_scenarios())
    return [question for question in _questions(TRAINING_QUESTIONS, TRAINING_SEED) if question not in held_out]


def evaluation_scenarios() -> list[Question]:
    """Held-out questions, each once: never trained on."""
    return list(dict.fromkeys(_questions(HELD_OUT_QUESTIONS, HELD_OUT_SEED)))


def reward(text: str | None, answer: str) -> float:
    """1 if the last number of the reply is the answer."""
    numbers = re.findall(r"-?\d+", (text or "").replace(",", "").replace("−", "-"))
    return float(bool(numbers) and int(numbers[-1]) == int(answer))


async def rollout(model: ls.TrainableModel, scenario: Question, temperature: float) -> ls.Trajectory:
    messages = [{"role": "user", "content": scenario.text}]
    completion = await model.openai_client().chat.completions.create(
        model=model.inference_name(), messages=messages, temperature=temperature, max_tokens=REPLY_TOKENS
    )
    choice = completion.choices[0]
    return ls.Trajectory(
        messages_and_choices=[*messages, choice], reward=reward(choice.message.content, scenario.answer)
    )
