"""The folder of a base model: a local folder as it is, or a Hugging Face id's folder in the local
cache, downloaded if it is not there.
"""

from __future__ import annotations

import re
from pathlib import Path

from lockstep.errors import UnsupportedModelError


def is_folder(base_model: str) -> bool:
    """True when `base_model` names an existing folder and not a Hugging Face id."""
    return Path(base_model).expanduser().is_dir()


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_DESCRIBING = ("*.json", "*.jinja", "*.txt")
"""Everything but the weights: configuration, tokenizer, chat template."""


def described_folder(base_model: str) -> Path:
    """`checkpoint_folder` without the weights: what a model is, its tokenizer and its chat
    template.
    """
    return _folder(base_model, _DESCRIBING)


def checkpoint_folder(base_model: str, *, weights: bool = True) -> Path:
    """The folder that holds a base model's `config.json` (and weights).

    A Hugging Face id is looked up in the cache and downloaded when it is missing there
    (`HF_HUB_OFFLINE=1` forbids it). Raises UnsupportedModelError when it can't be had.
    """
    return _folder(base_model, (*_DESCRIBING, "*.safetensors") if weights else ("config.json",))


def _folder(base_model: str, patterns: tuple[str, ...]) -> Path:
    if is_folder(base_model):
        return Path(base_model).expanduser().resolve()
    if not _HUB_ID.fullmatch(base_model):
        raise UnsupportedModelError(
            f"{base_model} is no folder here, and no Hugging Face id, which is ORGANIZATION/NAME: give the path of a "
            "checkpoint's folder"
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        raise UnsupportedModelError(
            f"{base_model} is no local folder, and downloading needs huggingface_hub; "
            "install lockstep-rl[train] or give a folder"
        ) from error
    try:
        return Path(snapshot_download(base_model, allow_patterns=list(patterns)))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise UnsupportedModelError(
            f"{base_model} is neither a local folder nor a model that could be downloaded ({' '.join(str(error).split())})"
        ) from error
