"""The interface of a family towards the engine. One instance per spec, made on first use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from lockstep.errors import WeightsError
from lockstep.models.config import ModelConfig
from lockstep.models.contract import Layout, Shard, Sizes
from lockstep.models.layout_rules import Stage
from lockstep.models.spec import ModelSupportSpec


@dataclass(frozen=True)
class CompilePolicy:
    """regions: parts of the engine worth compiling on a GPU."""

    regions: tuple[str, ...] = ("attention", "norm", "mlp")


@dataclass(frozen=True)
class ModelSupportHandler:
    """A family's contract and engine policy.

    contract: every parameter of a rank.
    """

    spec: ModelSupportSpec
    contract: Callable[[Stage], list[Shard]]
    compile: CompilePolicy = CompilePolicy()

    def shards(self, config: ModelConfig, layout: Layout, sizes: Sizes, layers: range) -> list[Shard]:
        """This rank's parameters. Raises ConfigError when the sizes don't divide the model."""
        return self.contract(Stage(config, layout, sizes, layers))

    def all_shards(self, config: ModelConfig, layout: Layout) -> list[Shard]:
        """The model as a single rank holds it; its pieces tell every tensor a checkpoint must have."""
        return self.shards(config, layout, Sizes(), range(config.layers))

    def skip_reason(self, name: str) -> str | None:
        """Why a checkpoint tensor is carried over instead of loaded, or None when it isn't."""
        return next((reason for prefix, reason in self.spec.skipped if name.startswith(prefix)), None)

    def layout(self, config: ModelConfig, names: Collection[str]) -> Layout:
        """The spelling of the family that a checkpoint with these tensor names uses. Raises
        WeightsError when it mixes two.
        """
        text = [n for n in names if self.skip_reason(n) is None]
        nested = any(n.startswith("model.language_model.") for n in text)
        prefix = "model.language_model." if nested else "model."
        stacked = any(n.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")) for n in text)
        if nested and any(n.startswith("model.layers.") for n in text):
            raise WeightsError(
                "the checkpoint has text weights under both model.layers. and model.language_model.; keep one"
            )
        if stacked and any(".mlp.experts.0." in n for n in text):
            raise WeightsError("the checkpoint has experts both stacked and one by one; keep one")
        return Layout(prefix, stacked, config.tied and "lm_head.weight" in names)


def tensor_shapes(shards: Iterable[Shard]) -> dict[str, tuple[int, ...]]:
    """Full shape of every Hugging Face tensor that `shards` (of a whole model) read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        tail = shard.shape[1:] if len(shard.shape) != 3 or shard.domain != "expert_tensor" else shard.shape[2:]
        for piece in shard.pieces:
            if piece.name is None:
                continue
            rest = tail if piece.col_stop is None else (piece.col_stop, *tail[1:])
            here = (piece.stop, *rest) if piece.index is None else (piece.index + 1, piece.stop, *rest)
            known = shapes.get(piece.name, here)
            shapes[piece.name] = tuple(max(a, b) for a, b in zip(known, here, strict=True))
    return shapes
