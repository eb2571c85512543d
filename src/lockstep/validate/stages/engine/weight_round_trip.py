"""Stage weight_round_trip: a checkpoint read as ranks read it, and written back, keeps its bytes."""

from __future__ import annotations

import filecmp
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lockstep.errors import ConfigError
from lockstep.models.checkpoint.export import export_checkpoint
from lockstep.models.checkpoint.load import load_shards
from lockstep.models.checkpoint.read import Checkpoint, expected_tensors, open_checkpoint
from lockstep.models.checkpoint.shares import Share, share_out
from lockstep.models.config import ModelConfig
from lockstep.models.contract import Piece, Sizes
from lockstep.models.handler import ModelSupportHandler
from lockstep.models.parallel_sizes import check_sizes, stage_layers
from lockstep.models.registry import get_model_support_handler, load_model_config
from lockstep.validate.figures import Figure, Outcome, count, judged
from lockstep.validate.reference.assembled import Rank, hf_tensors, same_bytes
from lockstep.validate.request import Request
from lockstep.validate.tolerances import limit_of

_SIZES = (*itertools.product((1, 2), (1, 2), (1, 2), (1, 2)), (3, 1, 1, 1))
"""(tensor, expert, expert tensor, pipeline)."""
Spoiled = Callable[[list[list[Share]], Sequence[Rank]], None]


@dataclass(frozen=True)
class Model:
    """A checkpoint with what reads it."""

    handler: ModelSupportHandler
    config: ModelConfig
    checkpoint: Checkpoint


def open_model(request: Request) -> Model:
    """Raises WeightsError for a checkpoint with missing or unknown tensors."""
    handler, config = get_model_support_handler(str(request.base_model)), load_model_config(str(request.base_model))
    return Model(handler, config, open_checkpoint(request.base_model, handler, config))


def run(request: Request) -> Outcome:
    """See the module."""
    model = open_model(request)
    figures, layouts = [], [sizes for sizes in _SIZES if divides(model.config, sizes)]
    for sizes in layouts:
        request.say(f"TP {sizes[0]}, EP {sizes[1]}, ETP {sizes[2]}, PP {sizes[3]}")
        figures.append(measure(model, sizes))
    figures.append(_files(model, layouts[-1], request))
    skipped = [f"{name}: {reason}" for name, reason in model.handler.spec.skipped]
    return judged(figures, [f"{len(model.checkpoint.trained)} tensors are read", *skipped])


def divides(config: ModelConfig, sizes: tuple[int, int, int, int]) -> bool:
    """True if the model can be split so."""
    try:
        check_sizes(config, Sizes(tp=sizes[0], ep=sizes[1], etp=sizes[2], pp=sizes[3]))
    except ConfigError:
        return False
    return True


def read_ranks(model: Model, sizes: tuple[int, int, int, int]) -> list[Rank]:
    """What every rank of this layout reads from the checkpoint."""
    tp, ep, etp, pp = sizes
    stages = stage_layers(model.config.layers, pp)
    ranks: list[Rank] = []
    for t, e, x, p in itertools.product(*map(range, sizes)):
        here = Sizes(tp, t, ep, e, etp, x, pp, p)
        shards = model.handler.shards(model.config, model.checkpoint.layout, here, stages[p])
        ranks.append((shards, dict(load_shards(model.checkpoint, shards))))
    return ranks


def measure(model: Model, sizes: tuple[int, int, int, int], spoil: Spoiled | None = None) -> Figure:
    """How many tensors differ after reading and writing. spoil: changes what the ranks supply."""
    ranks = read_ranks(model, sizes)
    shapes = expected_tensors(model.handler, model.config, model.checkpoint.layout)
    if model.checkpoint.layout.stored_tied_head:
        shapes.pop("lm_head.weight")  # written as a copy of the embedding
    shares = share_out([shards for shards, _ in ranks], shapes)
    if spoil is not None:
        spoil(shares, ranks)
    written = dict(hf_tensors(ranks, shapes, shares))
    wrong = [
        name
        for name, shape in shapes.items()
        if name not in written
        or not same_bytes(written[name], model.checkpoint.read(Piece(name, 0, shape[0])).view(shape))
    ]
    model.checkpoint.release()
    label = f"tensors that differ at TP {sizes[0]}, EP {sizes[1]}, ETP {sizes[2]}, PP {sizes[3]}"
    return count(label, len(wrong), limit_of("bytes that differ"), wrong[0] if wrong else "", f"of {len(shapes)}")


def _files(model: Model, sizes: tuple[int, int, int, int], request: Request) -> Figure:
    """The checkpoint written as a folder: every file the same."""
    shapes = expected_tensors(model.handler, model.config, model.checkpoint.layout)
    shapes.pop("lm_head.weight", None) if model.checkpoint.layout.stored_tied_head else None
    target = export_checkpoint(
        model.checkpoint, hf_tensors(read_ranks(model, sizes), shapes), request.folder / "written"
    )
    names = sorted(path.name for path in target.iterdir())
    _, different, missing = filecmp.cmpfiles(request.base_model, target, names, shallow=False)
    wrong = different + missing
    return count("files that differ", len(wrong), limit_of("bytes that differ"), ", ".join(wrong), f"of {len(names)}")
