"""The task NAME: what the model is asked, and what its answer earns."""

import random
import re
from typing import Any

import lockstep as ls


def scenarios() -> list[dict]:
    """What the model trains on. Each is tried several times a step, and its tries are compared with each other."""
    return [{"question": f"What is {a} plus {b}?", "answer": a + b} for a in range(2, 10) for b in range(2, 10)]


def evaluation_scenarios() -> list[dict]:
    """Held out: the greedy reward of the table is measured on these."""
    return [{"question": f"What is {a} plus {a + 1}?", "answer": 2 * a + 1} for a in range(10, 26)]


def reward(text: str, answer: int) -> float:
    """1 for the right number, 0.1 for any number: a part of the reward for a part of the work."""
    numbers = re.findall(r"\d+", text)
    if not numbers:
        return 0.0
    return 1.0 if int(numbers[-1]) == answer else 0.1


async def rollout(model: ls.TrainableModel, scenario: dict, temperature: float) -> ls.Trajectory:
    """One try. Replace it by your agent: more turns, tools, other services. Keep each choice as the server returned it."""
    messages: list[Any] = [{"role": "user", "content": scenario["question"]}]
    completion = await model.openai_client().chat.completions.create(
        model=model.inference_name(), messages=messages, temperature=temperature, max_tokens=32
    )
    choice = completion.choices[0]
    text = choice.message.content or ""
    return ls.Trajectory(
        messages_and_choices=[*messages, choice],
        reward=reward(text, scenario["answer"]),
        metrics={"answered": float(bool(re.search(r"\d", text)))},
    )


def demonstrations(rng: random.Random) -> list[dict]:
    """What the tiny model of `--tiny` learns before training: to answer with some number. A real model needs none."""
    return [
        {
            "messages": [
                {"role": "user", "content": scenario["question"]},
                {"role": "assistant", "content": str(rng.choice([scenario["answer"], rng.randint(4, 18)]))},
            ]
        }
        for scenario in scenarios()
        for _ in range(4)
    ]
