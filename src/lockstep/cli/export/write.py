"""Writes the folder of an export: under a temporary name, checked, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.errors import ConfigError, StoreError
from lockstep.models.checkpoint.hub import checkpoint_folder
from lockstep.models.checkpoint.peft import CONFIG
from lockstep.runs.checkpoint import RunCheckpoint, file_digest

_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
_OF_TINY_MODELS = ("warmup.json", "demonstrations.json")
"""How `--tiny` made its base model: nothing that a loader reads."""
Check = Callable[[Path], dict[str, float]]
Card = Callable[[str, dict[str, float]], str]


@dataclass(frozen=True)
class Exported:
    """kind: "adapter", a PEFT folder; "merged", a Hugging Face folder of all weights.
    base_model: as the run names it.
    differences: what the check measured.
    """

    folder: Path
    kind: str
    base_model: str
    step: int
    differences: dict[str, float]


def export_step(
    checkpoint: RunCheckpoint, identity: dict[str, Any], merge: bool, target: Path, check: Check, card: Card
) -> Exported:
    """Write the step to `target`.

    check: loads the folder again, raises for a difference, and returns what it measured.
    card: the text of README.md, from the measured differences.

    Nothing is under `target` before all of it is written and checked, and nothing stays of an
    export that failed. Raises ConfigError for a target that exists, and what `check` raises.
    """
    target = target.expanduser().resolve()
    if target.exists():
        raise ConfigError(f"{target} exists: give a new folder")
    full = identity["lora"] is None
    kind = "merged" if merge or full else "adapter"
    with _partial(target) as partial:
        if full:
            _copy(checkpoint, checkpoint.path / "model", partial)
        elif merge:
            from lockstep.cli.export.merge import merge_adapter  # torch

            partial.rmdir()
            merge_adapter(checkpoint_folder(identity["base_model"]), checkpoint.adapter, partial)
        else:
            _copy(checkpoint, checkpoint.adapter, partial)
            _name_base(partial, identity["base_model"])
            _copy_tokenizer(checkpoint_folder(identity["base_model"]), partial)
        for name in _OF_TINY_MODELS:
            (partial / name).unlink(missing_ok=True)
        differences = check(partial)
        (partial / "README.md").write_text(card(kind, differences), encoding="utf-8")
        partial.rename(target)
    return Exported(target, kind, identity["base_model"], checkpoint.number, differences)


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """An empty folder beside the target, gone at the end. Those of processes that were killed go
    too.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob(f".{target.name}.*.exporting"):
        owner = old.name.split(".")[-2]
        if not Path(f"/proc/{owner}").exists():
            shutil.rmtree(old, ignore_errors=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.exporting")
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy(checkpoint: RunCheckpoint, source: Path, partial: Path) -> None:
    """Byte for byte; what was written is compared with the step's manifest."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        copy = partial / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        if checkpoint.manifest["files"].get(file.relative_to(checkpoint.path).as_posix()) != file_digest(copy):
            raise StoreError(f"{copy}: the bytes are not those of step {checkpoint.number}: export again")


def _name_base(partial: Path, base_model: str) -> None:
    """PEFT loads the base by this name: what the run was given, a Hugging Face id for one."""
    file = partial / CONFIG
    config = json.loads(file.read_text(encoding="utf-8")) | {"base_model_name_or_path": base_model}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_tokenizer(base: Path, partial: Path) -> None:
    for pattern in _TOKENIZER:
        for file in base.glob(pattern):
            shutil.copyfile(file, partial / file.name)
