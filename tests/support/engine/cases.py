"""Models and figures that several engine tests share. Batches and references are those of `lockstep.validate.reference`.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.models.tiny.write import write_tiny


def tiny(family: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    return write_tiny(family, folder, seed=seed, overrides=overrides)


def reference_logprobs(model: Any, tokens: np.ndarray, temperatures: np.ndarray | None = None) -> Tensor:
    """[T-1] log-probability of each token after the first, by the dense computation on one unpacked sequence."""
    ids = torch.tensor(tokens, dtype=torch.long)[None]
    logits = model(ids).logits[0, :-1].float()
    if temperatures is not None:
        logits = logits / torch.tensor(temperatures[1:])[:, None]
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def relative(actual: Tensor, expected: Tensor, floor: float = 1e-5) -> float:
    """Largest difference over the expected tensor's largest value, which counts at least `floor`."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=floor))
