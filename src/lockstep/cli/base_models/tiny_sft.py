"""Teach a tiny random model the format of a task by a few seconds of supervised training. An
untrained model would never answer.

Runs as a process of its own (`python -m lockstep.cli.base_models.tiny_sft`), since it loads torch and
transformers. It trains all weights of the Hugging Face model in place, on the assistant's tokens
only, and leaves an ordinary checkpoint behind.

Shape suffixes: B batch, S tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

IGNORED = -100


def encode(tokenizer: Any, demonstration: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Token ids of one conversation, and labels that are IGNORED outside the assistant's turns.

    A turn's tokens are the difference between two renderings of the conversation: up to the turn
    with a generation prompt, and with the turn. Raises ValueError if the chat template doesn't
    extend its own prefix, since the labels would then be wrong.
    """
    messages, tools = demonstration["messages"], demonstration.get("tools")

    def render(count: int, prompt: bool) -> list[int]:
        text = tokenizer.apply_chat_template(
            messages[:count], tools=tools, tokenize=False, add_generation_prompt=prompt
        )
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids, labels = [], []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(index, prompt=True), render(index + 1, prompt=False)
        if after[: len(before)] != before or before[: len(ids)] != ids:
            raise ValueError(f"the chat template rewrites earlier turns, message {index} can't be labelled")
        labels += [IGNORED] * (len(before) - len(ids)) + after[len(before) :]
        ids = after
    return ids, labels


def teach(folder: Path, demonstrations: list[dict[str, Any]], steps: int, batch: int, rate: float, seed: int) -> float:
    """Train the checkpoint in `folder` in place; returns the last loss in nats per token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stored = json.loads((folder / "config.json").read_text())
    encoded = [encode(tokenizer, shown) for shown in demonstrations]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    loss = torch.tensor(float("nan"))
    for step in range(steps):
        chosen = [encoded[i] for i in torch.randint(len(encoded), (batch,), generator=order).tolist()]
        longest = max(len(ids) for ids, _ in chosen)
        ids_BS = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in chosen])
        labels_BS = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in chosen])
        loss = model(input_ids=ids_BS, labels=labels_BS).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == steps - 1:
            sys.stdout.write(f"{step + 1}/{steps} loss {loss.item():.3f}\n")
            sys.stdout.flush()
    dtype = stored.get("dtype") or stored.get("torch_dtype") or "float32"
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("demonstrations", type=Path, help="JSON list of {messages, tools}")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shown = json.loads(arguments.demonstrations.read_text())
    teach(arguments.folder, shown, arguments.steps, arguments.batch, arguments.rate, arguments.seed)


if __name__ == "__main__":
    main()
