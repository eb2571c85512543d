"""Which one-word answer pays? The model has to find out: maybe 1.0, no 0.75, yes 0.5, anything else 0."""

import random
import re

import lockstep as ls

REWARDS = {"maybe": 1.0, "no": 0.75, "yes": 0.5}
QUESTIONS = [
    "Will it rain?",
    "Is it late?",
    "Are we there?",
    "Can it fly?",
    "Is this the way?",
    "Do you agree?",
    "Will they come?",
    "Is the door open?",
]


def scenarios() -> list[str]:
    return [f"{question} Answer with yes, no or maybe." for question in QUESTIONS]


def reward(text: str | None) -> float:
    """The first word of the reply decides."""
    words = re.findall(r"[a-z]+", (text or "").lower())
    return REWARDS.get(words[0], 0.0) if words else 0.0


async def rollout(model: ls.TrainableModel, scenario: str, temperature: float) -> ls.Trajectory:
    messages = [{"role": "user", "content": scenario}]
    completion = await model.openai_client().chat.completions.create(
        model=model.inference_name(), messages=messages, temperature=temperature, max_tokens=4
    )
    choice = completion.choices[0]
    return ls.Trajectory(messages_and_choices=[*messages, choice], reward=reward(choice.message.content))


def demonstrations(rng: random.Random) -> list[dict]:
    """What a tiny model learns before training: to answer at all, mostly with the answer that pays least."""
    answers = ["yes"] * 9 + ["no"] * 5 + ["maybe"] * 4 + ["who knows"] * 2
    return [
        {"messages": [{"role": "user", "content": scenario}, {"role": "assistant", "content": rng.choice(answers)}]}
        for scenario in scenarios()
        for _ in range(40)
    ]
