"""A published step: an immutable folder with a manifest that holds the SHA-256 of every file, and
its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.errors import StoreError
from lockstep.process.durable import fsync

MANIFEST = "manifest.json"
SCHEMA = 2
_READABLE = (1, SCHEMA)
"""Schema 1 has neither the run's identity nor a digest of the manifest itself."""
STATELESS = "optimizer-state-removed"
"""In a step's folder: its files below trainer/ are gone, or about to go."""
_FIELDS = {"step": int, "files": dict, "metrics": dict, "state": dict}


@dataclass(frozen=True)
class RunCheckpoint:
    """A published step: `number`, its folder, and the manifest it was published with."""

    number: int
    path: Path
    manifest: Mapping[str, Any]

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def trainer(self) -> Path:
        return self.path / "trainer"

    @property
    def resumable(self) -> bool:
        """Training can go on from here: retention has left the optimizer's state."""
        return not (self.path / STATELESS).exists()

    @property
    def state(self) -> Mapping[str, Any]:
        """The caller's own data of the step (position in the data, and the like)."""
        return self.manifest["state"]


def write_manifest(folder: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Digest and flush every file of `folder`, and write its manifest with these fields."""
    files = {}
    for file in _files(folder):
        fsync(file)
        files[str(file.relative_to(folder))] = file_digest(file)
    manifest = {"schema": SCHEMA, "files": files, **fields}
    manifest["digest"] = _digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False))
    fsync(folder / MANIFEST)
    for inner in [folder, *(child for child in folder.rglob("*") if child.is_dir())]:
        fsync(inner)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """A step's manifest. Raises StoreError where it was changed, or is not one that this version
    reads.
    """
    file, remedy = folder / MANIFEST, f"the step is damaged; delete {folder} to resume before it"
    try:
        manifest = json.loads(file.read_text())
    except ValueError:
        raise StoreError(f"{file} is not JSON: {remedy}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") not in _READABLE:
        raise StoreError(f"{file} is not of schema {' or '.join(map(str, _READABLE))}, which this version reads")
    for name, kind in _FIELDS.items():
        if not isinstance(manifest.get(name), kind):
            raise StoreError(f"{file} has no {name}: {remedy}")
    if manifest["schema"] > 1 and manifest.get("digest") != _digest(manifest):
        raise StoreError(f"{file} was changed after it was published: {remedy}")
    return manifest


def read_checked(number: int, folder: Path) -> RunCheckpoint:
    """The step in `folder`, its files compared with the manifest. Raises StoreError for a file that
    is missing, changed or new.
    """
    manifest = read_manifest(folder)
    present = {str(file.relative_to(folder)) for file in _files(folder)}
    stateless = (folder / STATELESS).exists()
    for name, digest in manifest["files"].items():
        if stateless and name.startswith("trainer/"):
            continue
        if name not in present:
            raise StoreError(f"{folder / name} is missing: the step is damaged; delete {folder} to resume before it")
        if file_digest(folder / name) != digest:
            raise StoreError(f"{folder / name} was changed after it was published; delete {folder} to resume before it")
    if extra := present - set(manifest["files"]):
        raise StoreError(f"{folder}: {sorted(extra)[0]} is not in the manifest; steps are immutable, remove the file")
    return RunCheckpoint(number, folder, manifest)


def _files(folder: Path) -> list[Path]:
    return sorted(
        file for file in folder.rglob("*") if file.is_file() and file not in (folder / MANIFEST, folder / STATELESS)
    )


def _digest(manifest: Mapping[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
