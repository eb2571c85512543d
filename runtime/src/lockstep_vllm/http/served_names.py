"""Under which names the base model's weights are served: the current version's, and older ones that rollouts still use.

A merged server holds one version. A rollout that began under `name@3` and asks for it again after the swap to `name@4` gets its
answer from what the server holds, and the reply says so: its `model` is `name@4`, and so is the version of its tokens. What may be
trained on is for the trainer to decide (`max_steps_off_policy`). A name that nobody kept is unknown (404).
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from starlette.datastructures import State


def keep_names(state: State, names: list[str]) -> list[str]:
    """From now on also answer to `names`, and to no other older name; the current one stays. Returns all names, the current first."""
    state.lockstep_kept_names = list(names)
    return rename_base(state, state.openai_serving_models.base_model_paths[0].name)


def rename_base(state: State, name: str) -> list[str]:
    """Serves the base model as `name` from now on; of its older names only those that `keep_names` was given stay."""
    paths: list[Any] = state.openai_serving_models.base_model_paths
    kept = [one for one in getattr(state, "lockstep_kept_names", []) if one != name]
    paths[:] = [type(paths[0])(name=one, model_path=paths[0].model_path) for one in [name, *kept]]
    return [name, *kept]
