"""Stage chat_template_rollout: the server's prompts are the trainer's, and a conversation over
several turns keeps its sampled ids.

Every scene is asked once. Then an agent speaks three turns in one episode, and its calls must make
one sequence in which each turn continues the tokens before it.
"""

from __future__ import annotations

from typing import Any

import httpx

from lockstep.batching.tokenize import tokenize
from lockstep.config import deadlines
from lockstep.validate.figures import Outcome, count, judged
from lockstep.validate.request import Request
from lockstep.validate.stages.files.tokenizer_and_template import load_tokenizer, render, scenes
from lockstep.validate.stages.server.served_run import opened

_TURNS = ("Hello, who are you?", "And what is rain?", "Say it again.")
_REPLY = 12


async def run(request: Request) -> Outcome:
    """See the module."""
    tokenizer = load_tokenizer(request)
    wrong, refused = [], []
    async with opened(request, "lora") as (_, model):
        for name, (messages, tools) in scenes(tokenizer).items():
            request.say(f"scene: {name}")
            body: dict[str, Any] = {"tools": tools} if tools else {}
            try:
                completion = await model.openai_client().chat.completions.create(
                    model=model.inference_name(), messages=messages, max_tokens=4, **body
                )
            except Exception as error:  # noqa: BLE001 (a request that is refused is reported by scene)
                refused.append(f"{name}: {error}"[:200])
                continue
            local = tokenizer.encode(render(tokenizer, messages, tools), add_special_tokens=False)
            if list(completion.choices[0].prompt_token_ids) != local:
                wrong.append(name)
        request.say("three turns in one episode")
        sequences, calls, forks = await _conversation(model)
    drifted = 0 if sequences == 1 and not forks else max(1, sequences - 1)
    figures = [
        count("prompts that differ from the trainer's", len(wrong), where=", ".join(wrong)),
        count("scenes that are refused", len(refused), where="; ".join(refused)),
        count("turns that do not continue the ids before them", drifted, where=str(forks or "")),
        count("calls of the conversation", calls, None),
    ]
    return judged(figures, [f"scenes: {', '.join(scenes(tokenizer))}"])


async def _conversation(model: Any) -> tuple[int, int, dict[str, int]]:
    """(sequences that the turns make, calls, forks by kind) of a conversation over an address alone."""
    episode = model.episode()
    messages: list[dict[str, Any]] = []
    headers = {"Authorization": f"Bearer {episode.api_key}"}
    async with httpx.AsyncClient(
        base_url=f"{episode.base_url}/", headers=headers, timeout=deadlines.REQUEST_S, trust_env=False
    ) as client:
        for text in _TURNS:
            messages.append({"role": "user", "content": text})
            body = {"model": "any", "messages": messages, "max_tokens": _REPLY}
            reply = await client.post("chat/completions", json=body)
            reply.raise_for_status()
            messages.append({"role": "assistant", "content": reply.json()["choices"][0]["message"]["content"] or ""})
    forks = {str(kind): number for kind, number in episode.forks.items()}
    made = tokenize(episode.trajectory(reward=1.0), model.name, 0, 0)
    return len(made.sequences), len(_TURNS), forks
