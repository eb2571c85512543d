"""The parameters that weight decay leaves alone, as a table. Decay pulls towards 0: right for a
matrix, wrong where 0 means something.

Names are Megatron's. Adapters always decay, as in PEFT: 0 is the base model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Exempt:
    """Parameters whose name matches `pattern` do not decay.

    tied: only where the embedding is also the LM head.
    """

    pattern: str
    why: str
    tied: bool = False


EXEMPT = (
    Exempt(r"norm\.weight$", "a scale: 0 silences the stream, or as a zero-centred one resets what was learnt"),
    Exempt(r"(^|[._])bias$", "an offset has no direction to shrink along"),
    Exempt(r"\.A_log$", "0 is a decay rate of 1, not of none: decay would pull all heads to one memory length"),
    Exempt(r"\.conv_weight$", "four taps a channel: a filter's gain, which no later norm makes up for"),
    Exempt(r"^embedding\.", "only the rows of a batch have gradients; the others would fade"),
    Exempt(r"^output_layer\.weight$", "the embedding under a second name, on the last pipeline stage", tied=True),
)
"""`dt_bias` is among the biases."""


def decays(name: str, tied: bool) -> bool:
    """True if weight decay acts on the parameter `name` of a model whose LM head is `tied` to its
    embedding.
    """
    if re.search(r"adapter\.lora_[AB]\.", name):
        return True
    return not any((tied or not rule.tied) and re.search(rule.pattern, name) for rule in EXEMPT)
