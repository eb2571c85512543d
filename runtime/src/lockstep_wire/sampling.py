"""Sampling settings under which log-probabilities are those of the softmax at the request's
temperature.
"""

from __future__ import annotations

SAMPLING_DEFAULTS: dict[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""vLLM's own defaults. The server reports these settings with each choice, as they took effect."""

LEAST_TEMPERATURE = 0.01
"""vLLM samples with this where a request asks for less (and more than 0), and reports what was
asked for.
"""
