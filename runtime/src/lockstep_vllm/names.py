"""Decides under which name an incoming weight is handed to the model.

A sender ships Hugging Face names unchanged. The live model's parameter names depend on the server.
With adapters, vLLM wraps layers, and their parameters move below one `.base_layer` segment. So a
name is tried against the *live* names as it is, then with one such segment added or removed.

Two mappings only *decide* that a name is known: fused owners (`q_proj` lives in `qkv_proj`, an
expert's `gate_proj` in `w13_weight`) and the model's own name mapper. The name itself is never
rewritten by them: the model's `load_weights` does that mapping, and would do it twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

BASE_LAYER = "base_layer"

# One expert of a layer, or all of them stacked; `.weight` or `.bias` is left out of stacked names
# in some checkpoints.
_EXPERT = re.compile(
    r"^(?P<owner>.*\.experts)(?P<outer>\.base_layer)?(?:\.\d+)?"
    r"\.(?P<projection>gate_up_proj|gate_proj|up_proj|down_proj)(?P<inner>\.base_layer)?(?:[._](?P<leaf>weight|bias))?$"
)


class UnknownWeightError(LookupError):
    """A weight that the live model has no place for."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"unknown weight {name!r}: the live model has no parameter of that name, with or without a base_layer segment, "
            "and none that it is fused into; nothing was loaded"
        )
        self.name = name


def resolve(
    name: str,
    live_names: Collection[str],
    packed_modules: Mapping[str, Sequence[str]],
    hf_to_vllm: Callable[[str], str | None] | None = None,
) -> str:
    """The name under which `name` is to be given to the model's `load_weights`.

    live_names: the model's parameter names (a set, for speed).
    packed_modules: fused module name to the names it is made of, e.g. `{"qkv_proj": ["q_proj",
        "k_proj", "v_proj"]}`.
    hf_to_vllm: the model's own name mapper; None from it means that the model drops the weight.

    Returns `name` itself or `name` with one `.base_layer` segment more or less. Raises
    UnknownWeightError otherwise.
    """
    owners = {part: fused for fused, parts in packed_modules.items() for part in parts}
    for candidate in _candidates(name):
        if _is_known(candidate, live_names, owners, hf_to_vllm):
            return candidate
    raise UnknownWeightError(name)


def _candidates(name: str) -> Iterator[str]:
    """The name; then with one base_layer segment removed; then with one added, before the leaf
    first.
    """
    yield name
    parts = name.split(".")
    for index in reversed(range(len(parts))):
        if parts[index] == BASE_LAYER:
            yield ".".join(parts[:index] + parts[index + 1 :])
    for index in reversed(range(1, len(parts))):
        if BASE_LAYER not in (parts[index - 1], parts[index]):
            yield ".".join([*parts[:index], BASE_LAYER, *parts[index:]])


def _is_known(
    name: str,
    live_names: Collection[str],
    owners: Mapping[str, str],
    hf_to_vllm: Callable[[str], str | None] | None,
) -> bool:
    spellings = [name]
    if hf_to_vllm is not None:
        mapped = hf_to_vllm(name)
        if mapped is not None and mapped != name:
            spellings.append(mapped)
    return any(candidate in live_names for spelling in spellings for candidate in _live_spellings(spelling, owners))


def _live_spellings(name: str, owners: Mapping[str, str]) -> Iterator[str]:
    """Live names that would hold a weight: its own, its fused owner's, its experts'."""
    yield name
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part in owners:
            yield ".".join([*parts[:index], owners[part], *parts[index + 1 :]])
    expert = _EXPERT.match(name)
    if expert is not None:
        yield from _expert_spellings(expert)


def _expert_spellings(expert: re.Match[str]) -> Iterator[str]:
    """vLLM holds a layer's experts as `w13` (gate and up) and `w2` (down), directly or in
    `routed_experts`.
    """
    leaf = ("w2_" if expert["projection"] == "down_proj" else "w13_") + (expert["leaf"] or "weight")
    owner = expert["owner"]
    if not (expert["outer"] or expert["inner"]):
        yield f"{owner}.{leaf}"
        yield f"{owner}.routed_experts.{leaf}"
    elif not (expert["outer"] and expert["inner"]):
        yield f"{owner}.{BASE_LAYER}.{leaf}"
        yield f"{owner}.{BASE_LAYER}.routed_experts.{leaf}"
        yield f"{owner}.routed_experts.{BASE_LAYER}.{leaf}"
