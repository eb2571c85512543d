"""The text of each sampled token, by the base model's tokenizer; ids where it is not here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

_BROKEN = "�"
_LONGEST = 8
"""Tokens that one character may be spread over."""


class TokenText:
    """name: of the base model, a folder or a Hugging Face id. Nothing is downloaded."""

    def __init__(self, base_model: str) -> None:
        self._tokenizer = _tokenizer(base_model)
        self._texts: dict[int, str] = {}

    @property
    def known(self) -> bool:
        return self._tokenizer is not None

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """A text per id; end to end they are the reply. A character that spans several tokens is
        the last one's.
        """
        if self._tokenizer is None:
            return [f"⟨{token}⟩" for token in ids]
        pieces, waiting = [], []
        for token in ids:
            text = self._text([*waiting, token])
            if text.endswith(_BROKEN) and len(waiting) < _LONGEST:
                waiting.append(token)
                pieces.append("")
            else:
                waiting = []
                pieces.append(text)
        if waiting:
            pieces[-1] = self._text(waiting)
        return pieces

    def _text(self, ids: list[int]) -> str:
        if len(ids) > 1:
            return self._tokenizer.decode(ids, skip_special_tokens=False)
        if ids[0] not in self._texts:
            self._texts[ids[0]] = self._tokenizer.decode(ids, skip_special_tokens=False)
        return self._texts[ids[0]]


@cache
def _tokenizer(base_model: str) -> Any:
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        return None
    file = _folder(base_model) / "tokenizer.json"
    return Tokenizer.from_file(str(file)) if file.is_file() else None


def _folder(base_model: str) -> Path:
    """A local folder, or a Hugging Face id's newest snapshot in the cache."""
    folder = Path(base_model).expanduser()
    if folder.is_dir():
        return folder
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache_folder = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    snapshots = sorted(
        (cache_folder / f"models--{base_model.replace('/', '--')}" / "snapshots").glob("*/tokenizer.json")
    )
    return snapshots[-1].parent if snapshots else folder
