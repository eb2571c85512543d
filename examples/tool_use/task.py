"""Two turns and a tool: look up how many are in stock, then say the number."""

import json
import random
import re
from dataclasses import dataclass

import lockstep as ls

STOCK = {"apples": 3, "pears": 7, "plums": 2, "figs": 5}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "stock",
            "description": "how many are left",
            "parameters": {"type": "object", "properties": {"item": {"type": "string"}}},
        },
    }
]


@dataclass(frozen=True)
class Scenario:
    item: str
    count: int

    @property
    def question(self) -> str:
        return f"How many {self.item}?"


def scenarios() -> list[Scenario]:
    return [Scenario(item, count) for item, count in STOCK.items()]


def asked_item(arguments: str) -> str | None:
    """Which item a call asks for; None for a call that asks otherwise."""
    try:
        asked = json.loads(arguments)
    except json.JSONDecodeError:
        return None
    item = asked["item"] if isinstance(asked, dict) and list(asked) == ["item"] else None
    return item if isinstance(item, str) else None


def call_tool(scenario: Scenario, arguments: str) -> str | None:
    """What the tool answers; None for a call that asks for something else than the question does."""
    return str(scenario.count) if asked_item(arguments) == scenario.item else None


async def rollout(model: ls.TrainableModel, scenario: Scenario, temperature: float) -> ls.Trajectory:
    """Reward 1.0: the right number after a lookup. 0.5: a right lookup, a wrong number. 0: no lookup, even if guessed right."""
    trajectory = ls.Trajectory(
        messages_and_choices=[{"role": "user", "content": scenario.question}], tools=TOOLS, reward=0.0
    )

    async def turn():
        completion = await model.openai_client().chat.completions.create(
            model=model.inference_name(),
            messages=trajectory.messages,
            tools=TOOLS,
            temperature=temperature,
            max_tokens=96,
        )
        trajectory.messages_and_choices.append(completion.choices[0])
        return completion.choices[0].message

    message = await turn()
    looked_up = False
    if message.tool_calls:
        call = message.tool_calls[0]
        answer = call_tool(scenario, call.function.arguments)
        looked_up = answer is not None
        if looked_up:
            trajectory.messages_and_choices.append({"role": "tool", "tool_call_id": call.id, "content": answer})
            message = await turn()
    right = re.findall(r"\d+", message.content or "") == [str(scenario.count)]
    trajectory.reward = 0.5 + 0.5 * right if looked_up else 0.0
    return trajectory


def demonstrations(rng: random.Random) -> list[dict]:
    """What a tiny model learns before training: both ways to answer: mostly a guess, sometimes the lookup."""
    shown = []
    for scenario in scenarios() * 60:
        user = {"role": "user", "content": scenario.question}
        if rng.random() < 0.65:
            messages = [user, {"role": "assistant", "content": str(rng.choice(list(STOCK.values())))}]
        else:
            call = {"type": "function", "function": {"name": "stock", "arguments": {"item": scenario.item}}}
            said = scenario.count if rng.random() < 0.8 else rng.randint(1, 9)
            messages = [
                user,
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": str(scenario.count)},
                {"role": "assistant", "content": str(said)},
            ]
        shown.append({"messages": messages, "tools": TOOLS})
    return shown
