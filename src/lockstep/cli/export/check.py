"""Loads an exported folder in transformers and in vLLM, and compares both with the checkpoint in
the trainer.

Shape suffix: T scored tokens of the text.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.errors import ConfigError, MismatchError, RuntimeNotInstalledError, ServerError
from lockstep.metrics.mismatch import logprob_mismatch
from lockstep.models.checkpoint.hub import checkpoint_folder
from lockstep.models.checkpoint.peft import CONFIG

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from lockstep.runs.checkpoint import RunCheckpoint

LIMITS = {"float32": 1e-4, "bfloat16": 0.05}
"""Mean |difference| in nats a token between two right programs: docs/numerics.md has 1e-6 to 1e-5,
and 0.01 to 0.04.
"""
_TEXT = (
    "The quick brown fox jumps over the lazy dog. Question: a shop sells pens for three coins each and books for "
    "seven; what do two pens and four books cost? Two pens cost six coins, four books cost twenty-eight, so together "
    "they cost thirty-four coins. In 1969 people first walked on the Moon; light needs 1.3 seconds for that way."
)
_LONGEST = 256


def text_ids(base: Path) -> list[int]:
    """The text in the base model's tokens."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(base / "tokenizer.json")).encode(_TEXT).ids[:_LONGEST]


def compare(
    folder: Path,
    checkpoint: RunCheckpoint,
    identity: dict[str, Any],
    score: Callable[..., Coroutine[Any, Any, list[float]]],
    serve: Callable[[Path, list[int]], Coroutine[Any, Any, list[float]]] | None = None,
) -> dict[str, float]:
    """Mean and largest |difference| in nats between the folder in transformers and the step in the
    trainer; `served_` in front of their names: in vLLM.

    score: model folder, ids, adapter folder, dtype: the trainer's log-probabilities.
    serve: folder, ids: vLLM's. None, or an error that says why vLLM can't serve it: no such check.

    Raises MismatchError for a folder that computes something else, ConfigError where PEFT is
    missing.
    """
    base, dtype = checkpoint_folder(identity["base_model"]), identity["dtype"]
    full = identity["lora"] is None
    ids = text_ids(base)
    loaded_T = transformers_logprobs(folder, base, ids, dtype)
    model, adapter = (checkpoint.path / "model", None) if full else (base, checkpoint.adapter)
    trainer_T = np.array(asyncio.run(score(str(model), ids, adapter, dtype)))
    measured = {"tokens": float(len(ids) - 1)} | _agree("transformers", loaded_T, trainer_T, checkpoint, dtype)
    if serve is None:
        return measured
    try:
        served_T = np.array(asyncio.run(serve(folder, ids)))
    except (RuntimeNotInstalledError, ServerError):
        return measured
    served = _agree("vLLM", served_T, trainer_T, checkpoint, dtype)
    return measured | {f"served_{name}": value for name, value in served.items()}


def _agree(
    program: str, logprobs_T: np.ndarray, trainer_T: np.ndarray, checkpoint: RunCheckpoint, dtype: str
) -> dict[str, float]:
    """Mean and largest |difference|."""
    difference = logprob_mismatch(trainer_T, logprobs_T)
    if not difference.mean_abs <= LIMITS[dtype]:
        raise MismatchError(
            f"the exported folder in {program} differs from step {checkpoint.number} by {difference.mean_abs:.2g} nats per token "
            f"on average, more than {LIMITS[dtype]:g}: nothing was kept; report it with the model's config.json"
        )
    return {"mean": difference.mean_abs, "largest": difference.largest}


def transformers_logprobs(folder: Path, base: Path, ids: list[int], dtype: str) -> np.ndarray:
    """float64 `[T]`: of each token after the first, by transformers, with PEFT for an adapter."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    adapter = (folder / CONFIG).is_file()
    source = base if adapter else folder
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    model.to(device)
    if adapter:
        try:
            import peft
        except ModuleNotFoundError:
            raise ConfigError(
                "the check of an adapter needs PEFT: pip install lockstep-rl[export]; or give --merged"
            ) from None
        model = peft.PeftModel.from_pretrained(model, str(folder))
    with torch.inference_mode():
        logits_TV = model(torch.tensor([ids], device=device)).logits[0, :-1].double()
        logprobs_TV = torch.log_softmax(logits_TV, dim=-1)
        return logprobs_TV.gather(1, torch.tensor(ids[1:], device=device)[:, None])[:, 0].cpu().numpy()
