"""A server on a CPU with AMX asks Linux for the tiles before it computes with them.

vLLM chooses its AMX experts by what the processor can do. Linux gives a process the tiles on demand
only (`arch_prctl`, ARCH_REQ_XCOMP_PERM). Nobody asks where no earlier product of oneDNN has, and
the first token of a bfloat16 mixture ends the worker with an illegal instruction.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import torch


def apply() -> None:
    """Asks for the tiles, for all threads of this process. For the CPU platform only."""
    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        raise RuntimeError("this CPU has AMX, and Linux does not give this process its tiles: vLLM can't compute here")
