"""Loads an exported folder in vLLM, where the server's environment is installed, and scores a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lockstep.models.checkpoint.peft import CONFIG

_NAME = "export"


async def served_logprobs(
    run: Path, step: int, folder: Path, ids: list[int], say: Callable[[str], None]
) -> list[float]:
    """Of each token after the first, in nats: by a server with the settings of the run.

    folder: a PEFT adapter, served on the run's base model, or a whole model.

    Raises RuntimeNotInstalledError without the server's environment, ServerError where vLLM does
    not load the folder.
    """
    from lockstep.backends.megatron.launch import serving_of
    from lockstep.inference.environment.install import find_runtime
    from lockstep.inference.environment.locate import default_kind
    from lockstep.inference.launch import launch

    adapter = (folder / CONFIG).is_file()
    config, _ = serving_of(run, step)
    if not adapter:
        config = config.model_copy(update={"model": folder, "lora": None, "served_name": _NAME})
    server = await launch(config, find_runtime(default_kind()), run, say, "export.log")
    try:
        if adapter:
            await server.load_adapter(_NAME, folder)
        return await server.score(_NAME, ids)
    finally:
        await server.close()
