"""A new run that begins at a published step of another: its weights, its optimizer's state, and its position in data and
noise.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lockstep.errors import StoreError
from lockstep.runs.store import RunStore, read_checkpoint

_OF_THE_RUN = ("key",)
"""Parts of an identity that no two runs share."""


def fork(run: Path, number: int, name: str) -> Path:
    """The folder of the new run `name`, beside `run`, whose only step is `number`.

    With the same settings its next step is that of the run, bit for bit. Raises StoreError for a step
    that is not published, is damaged, or has no optimizer state, and for a name that has steps.
    """
    run = run.expanduser().resolve()
    identity, checkpoint = read_checkpoint(run, number)
    if not checkpoint.resumable:
        raise StoreError(f"{checkpoint.path} has no optimizer state any more: fork a newer step")
    store = RunStore(run.parents[1], run.parent.name, name)
    try:
        if steps := store.published():
            raise StoreError(f"{store.path} has steps already, the last is {steps[-1]}: choose another name")
        store.claim({field: value for field, value in identity.items() if field not in _OF_THE_RUN})
        staged = store.stage(number)
        for file in checkpoint.manifest["files"]:
            (staged / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.path / file, staged / file)
        store.publish_first(number, staged, checkpoint.manifest["metrics"], checkpoint.state)
    finally:
        store.close()
    return store.path
