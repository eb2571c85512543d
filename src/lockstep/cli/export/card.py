"""The model card of an export: what it is, how it was trained, its figures, and how to load it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lockstep import __version__
from lockstep.metrics.names import METRICS

_SHOWN = (
    *("greedy_reward", "reward", "reward_std", "loss", "mismatch", "entropy"),
    *("reply_tokens_mean", "verified_identity", "verification_power"),
)

_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
"""
_MERGED = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def model_card(
    name: str,
    step: int,
    identity: Mapping[str, Any],
    metrics: Mapping[str, float],
    kind: str,
    differences: Mapping[str, float],
) -> str:
    """README.md of the folder. name: project/name of the run."""
    base, lora = identity["base_model"], identity["lora"]
    weights = f"LoRA, rank {lora['rank']}, alpha {lora['alpha']:g}" if lora else "all weights"
    known = [(label, value) for label in _SHOWN if (value := metrics.get(label)) is not None and math.isfinite(value)]
    rows = "\n".join(f"| {label} | {value:.4g} | {_cell(METRICS[label].says)} |" for label, value in known)
    programs = [("transformers", "")] + ([("vLLM", "served_")] if "served_mean" in differences else [])
    checked = "\n".join(
        f"| {program} | {differences[f'{key}mean']:.2g} | {differences[f'{key}largest']:.2g} |"
        for program, key in programs
    )
    load = (_ADAPTER if kind == "adapter" else _MERGED).format(base=base)
    serve = (
        f"vllm serve {base} --enable-lora --lora-modules trained=FOLDER" if kind == "adapter" else "vllm serve FOLDER"
    )
    return f"""---
base_model: {base}
library_name: {"peft" if kind == "adapter" else "transformers"}
pipeline_tag: text-generation
tags: [reinforcement-learning, lockstep{", lora" if kind == "adapter" else ""}]
---

# {name}, step {step}

{base} trained by reinforcement learning with Lockstep {__version__}: {weights}, {identity["dtype"]}.
This folder is {"a PEFT adapter" if kind == "adapter" else "the whole model"}.

## Figures of the step

| metric | value | meaning |
|---|---|---|
{rows}

The folder was loaded again, and its log-probabilities of {differences["tokens"]:.0f} tokens compared with the
trainer's. |Difference| in nats per token:

| program | mean | largest |
|---|---|---|
{checked}

## Load

```python
{load}```

```sh
{serve}
```
"""
