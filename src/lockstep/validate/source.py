"""MODEL of `lockstep validate` as a checkpoint folder: a folder, a Hugging Face id, a GGUF file, a
family's key, or the base model of a run.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.errors import ConfigError
from lockstep.models.checkpoint.hub import checkpoint_folder
from lockstep.models.checkpoint.read import Checkpoint
from lockstep.models.config import read_json
from lockstep.models.contract import Piece
from lockstep.models.discovery import inspect_architecture
from lockstep.models.registry import get_model_support_spec
from lockstep.models.tiny.write import tiny_models, write_tiny
from lockstep.runs.database import FILE as RUN_FILE
from lockstep.validate.request import Device

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Source:
    """What is validated.

    kind: "tiny" (random weights made here), "gguf", "checkpoint" or "run".
    folder: the checkpoint. layers: "4 of 4".
    run: the run's folder, for kind "run".
    """

    model: str
    kind: str
    folder: Path
    family: str
    layers: str
    run: Path | None = None


def find_source(
    model: str, layers: str, device: Device, seed: int, scratch: Path, say: Callable[[str], None]
) -> Source:
    """The checkpoint of `model`, made below `scratch` where there is none yet.

    layers: "all", or "minimal": the fewest leading layers that contain every kind, at least two.
    device: a model that is made for a GPU has the head sizes of its family's releases.

    Raises ConfigError, UnsupportedModelError or WeightsError.
    """
    if layers not in ("all", "minimal"):
        raise ConfigError(f"--layers {layers}: it is all or minimal")
    kind, folder, run = _folder(model, device, seed, scratch, say)
    spec = get_model_support_spec(str(folder))
    total = _text_config(read_json(folder))["num_hidden_layers"]
    kept = total
    if layers == "minimal":
        kept = min(total, max(2, inspect_architecture(str(folder)).minimum_layers))
        if kept < total:
            say(f"keeping {kept} of {total} layers")
            folder = cut_layers(folder, scratch / "cut", kept)
    return Source(model, kind, folder, spec.key, f"{kept} of {total}", run)


def _folder(
    model: str, device: Device, seed: int, scratch: Path, say: Callable[[str], None]
) -> tuple[str, Path, Path | None]:
    path = Path(model).expanduser()
    if path.is_file():
        from lockstep.models.gguf.convert import import_gguf

        return "gguf", import_gguf(path, scratch / "imported", say=say), None
    if (path / RUN_FILE).is_file():
        from lockstep.backends.megatron.launch import serving_of

        server, _ = serving_of(path.resolve(), None)
        return "run", Path(server.model), path.resolve()
    if not path.is_dir() and model in tiny_models():
        say(f"making a tiny {model}")
        sizes = tiny_models()[model].on_gpu if device == "cuda" else {}
        return "tiny", write_tiny(model, scratch / "tiny", seed=seed, overrides=sizes), None
    return "checkpoint", checkpoint_folder(model), None


def _text_config(raw: dict[str, Any]) -> dict[str, Any]:
    return raw.get("text_config") or raw


def cut_layers(source: Path, target: Path, layers: int) -> Path:
    """A checkpoint of the first `layers` layers: same tokenizer, embedding, final norm and head."""
    from safetensors.torch import save_file

    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and "safetensors" not in path.name:
            shutil.copyfile(path, target / path.name)
    raw = read_json(source)
    text = _text_config(raw)
    text["num_hidden_layers"] = layers
    if isinstance(text.get("layer_types"), list):
        text["layer_types"] = text["layer_types"][:layers]
    if isinstance(text.get("mlp_only_layers"), list):
        text["mlp_only_layers"] = [number for number in text["mlp_only_layers"] if number < layers]
    (target / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    checkpoint, tensors = Checkpoint(source), {}
    for name, stored in checkpoint.tensors.items():
        number = _LAYER.search(name)
        if number is None or int(number[1]) < layers or name.startswith(("mtp.", "model.visual.")):
            tensors[name] = checkpoint.read(Piece(name, 0, stored.shape[0])).clone()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
