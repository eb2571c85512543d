"""What the tests of expert replay share: rollouts served in every way, their routed experts, and planted faults.

Shape suffixes: S tokens, L mixture-of-experts layers, K experts per token.
"""

from __future__ import annotations

import asyncio
import base64
import io
import random

import numpy as np

import lockstep as ls
from lockstep.batching.routed_experts import RoutedExpertsShape, decode_routed_experts
from lockstep.testing.in_flight import counted
from lockstep_wire.routed_experts import routed_experts_digest

SHAPE = RoutedExpertsShape(layers=4, top_k=2, experts=8)
"""Of the tiny mixtures of experts."""
FAULTS = {
    "one row dropped": r"has routed experts for \d+ of \d+ tokens: 1 are lost",
    "two rows swapped": "rows were changed or moved",
    "a sibling without routed experts": "has no routed experts for tokens 0 to",
    "an id out of range": "token 3: expert 8 is out of range",
    "an expert twice": "token 3: a layer names the same expert twice",
}
"""What `plant` does to a choice, and what the error says."""


def words(count: int) -> dict[str, str]:
    """A message of random letters, most of them tokens of their own."""
    return {"role": "user", "content": "".join(random.choice("abcdefghij ") for _ in range(count))}


async def roll_out(model, messages, n=1, tokens=8, temperature=1.0, **settings):
    completion = await model.openai_client().chat.completions.create(
        model=model.inference_name(),
        messages=messages,
        n=n,
        max_tokens=tokens,
        temperature=temperature,
        extra_body={"ignore_eos": True, **settings},
    )
    return [ls.Trajectory(messages_and_choices=[*messages, choice], reward=0.0) for choice in completion.choices]


def group(trajectories, reward=None):
    for number, trajectory in enumerate(trajectories):
        trajectory.reward = float(number) if reward is None else reward
    return ls.TrajectoryGroup(trajectories=trajectories)


def routed_experts_of(choice) -> np.ndarray:
    return decode_routed_experts(
        choice.routed_experts, choice.routed_experts_digest, choice.prompt_token_ids, choice.token_ids, SHAPE, "it"
    )


def prompt_tokens(trajectories) -> int:
    return sum(len(choice.prompt_token_ids) for trajectory in trajectories for choice in trajectory.choices)


async def prefix_hits(server) -> float:
    return await counted(server, "prefix_cache_hits_total")


async def printable(model, messages):
    """A turn whose text is tokenized to what was sampled: most of a random model's bytes are no text.

    Hot, and in more tries than are needed: a step or two at a high rate make a policy whose 320 turns had no text, now and then.
    """
    for _ in range(60):
        for turn in await roll_out(model, messages, n=16, tokens=2, temperature=2.0):
            text = turn.choices[-1].message.content or ""
            if len(text) == 2 and all("!" <= letter <= "Z" for letter in text):  # small letters may become one token
                return turn.choices[-1]
    raise AssertionError("no printable turn in 960")


async def multi_turn(model):
    """Three turns; each prompt repeats the history as the chat template renders it, and so continues the same sequence."""
    messages: list = [words(30)]
    for _ in range(3):
        choice = await printable(model, [m if isinstance(m, dict) else m.message.model_dump() for m in messages])
        messages += [choice, words(10)]
    return ls.Trajectory(messages_and_choices=messages[:-1], reward=0.0)


async def stopped_by_text(model):
    """A choice that a stop string ended, which the server's API process finds and its engine doesn't know."""
    for seed in range(20):
        (free,) = await roll_out(model, [words(30)], tokens=24, seed=seed)
        text = free.choices[0].message.content or ""
        late = [letter for letter in text if "!" <= letter <= "~" and 5 < text.index(letter) < len(text) - 1]
        if late:
            (stopped,) = await roll_out(model, free.messages_and_choices[:1], tokens=24, seed=seed, stop=late[0])
            assert stopped.choices[0].finish_reason == "stop"
            assert len(stopped.choices[0].token_ids) < 24
            return stopped
    raise AssertionError("no printable letter in 20 texts")


async def served_in_every_way(model, server, block=128, long=600, chunked=(8, 900)) -> dict[str, list]:
    """Trajectories by the way they were served. block: tokens of a block of vLLM's prefix cache, which holds whole blocks only.

    long: letters of a prompt of more than one block. chunked: so many prompts of so many letters fill more than one batch.
    """
    text = words(long)
    served = {"cold": await roll_out(model, [text])}
    # A hybrid model's first request leaves no state at a block's end, its second one does.
    for _ in range(2):
        before = await prefix_hits(server)
        served["prefix-cache hit"] = await roll_out(model, [text])
        hits = await prefix_hits(server) - before
        if hits:
            break
    assert hits == (prompt_tokens(served["cold"]) - 1) // block * block > 0
    served["longer prompt over a cached one"] = await roll_out(model, [{**text, "content": text["content"] + " abc"}])
    assert await prefix_hits(server) >= before + 2 * hits
    served["n = 4"] = await roll_out(model, [words(40)], n=4)
    served["stop string"] = [await stopped_by_text(model)]
    served["multi-turn"] = [await multi_turn(model)]
    many = await asyncio.gather(*(roll_out(model, [words(chunked[1])], tokens=4) for _ in range(chunked[0])))
    served["chunked prefill"] = [trajectory for part in many for trajectory in part]
    return served


def encode(rows) -> str:
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return base64.b64encode(buffer.getvalue()).decode()


def with_routed_experts(choice, rows, honest_digest=True) -> None:
    """Give a choice other routed experts; with `honest_digest`, those of a server that made them."""
    text = encode(rows)
    choice.routed_experts = text
    if honest_digest:
        choice.routed_experts_digest = routed_experts_digest(
            choice.prompt_token_ids, choice.token_ids, base64.b64decode(text)
        )


def plant(fault: str, choice) -> None:
    rows = routed_experts_of(choice)
    if fault == "one row dropped":
        with_routed_experts(choice, np.delete(rows, len(rows) // 2, axis=0))
    elif fault == "two rows swapped":
        different = next(k for k in range(1, len(rows)) if (rows[k] != rows[0]).any())
        rows[[0, different]] = rows[[different, 0]]
        with_routed_experts(choice, rows, honest_digest=False)
    elif fault == "an id out of range":
        rows[3, 1, 0] = SHAPE.experts
        with_routed_experts(choice, rows)
    elif fault == "an expert twice":
        rows[3, 1] = rows[3, 1, 0]
        with_routed_experts(choice, rows)
    else:
        choice.routed_experts = choice.routed_experts_digest = None
