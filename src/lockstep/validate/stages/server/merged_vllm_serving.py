"""Stage merged_vllm_serving: after each sync of merged weights the server's answers are those of
Hugging Face with the step's adapter merged.
"""

from __future__ import annotations

from lockstep.validate.figures import Outcome
from lockstep.validate.request import Request
from lockstep.validate.stages.server.served_steps import serve_steps


async def run(request: Request) -> Outcome:
    """See the module."""
    return await serve_steps(request, "merged")
