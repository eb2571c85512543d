"""Stage native_vllm_lora: adapters that the server holds, step by step, have the effect that they
have in Hugging Face.
"""

from __future__ import annotations

from lockstep.validate.figures import Outcome
from lockstep.validate.request import Request
from lockstep.validate.stages.server.served_steps import serve_steps


async def run(request: Request) -> Outcome:
    """See the module."""
    return await serve_steps(request, "lora")
