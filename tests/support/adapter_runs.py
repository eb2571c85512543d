"""A run's folder whose steps are random adapters of a tiny model."""

from __future__ import annotations

from pathlib import Path

from adapters import ALPHA, RANK, Model, random_adapter
from lockstep.models.tiny.write import write_tiny
from lockstep.runs.store import RunStore

FAMILIES = ("qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_moe", "llama3")
GREEDY = {1: 0.4, 2: 0.7, 3: 0.6}


def run_of(folder: Path, family: str, dtype: str = "float32", said_rank: int = RANK) -> Path:
    """Three steps, each a random adapter of a tiny model. said_rank: the run's; a server wants one of vLLM's."""
    overrides = {"dtype": dtype, "num_hidden_layers": 4 if family.startswith("qwen3_5") else 2}
    model = Model(write_tiny(family, folder / "base", seed=3, overrides=overrides))
    store = RunStore(folder, "demo", "run")
    lora = {"rank": said_rank, "alpha": ALPHA, "target_modules": None}
    store.claim(
        {"backend": "megatron", "base_model": str(model.folder), "lora": lora, "family": family, "dtype": dtype}
    )
    for step in range(4):
        staged = store.stage(step)
        model.write(staged / "adapter", random_adapter(model.sites, step), model.targets)
        store.publish(step, staged, {"loss": 0.1})
        if step in GREEDY:
            store.record(step, {"greedy_reward": GREEDY[step]})
    store.close()
    return store.path
