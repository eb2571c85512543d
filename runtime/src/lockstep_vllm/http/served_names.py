"""Under which names the base model's weights are served: the current version's, and older ones that
rollouts still use.

A merged server holds one version. A rollout may begin under `name@3` and ask for that name again
after the swap to `name@4`. The current weights then answer, and the reply says so: its `model` and
the version of its tokens are `name@4`. What may be trained on is for the trainer to decide
(`max_steps_off_policy`). A name that nobody kept is unknown (404).
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.datastructures import State


def keep_names(state: State, names: list[str]) -> list[str]:
    """From now on also answer to `names`, and to no other older name; the current one stays.
    Returns all names, the current first.
    """
    state.lockstep_kept_names = list(names)
    return rename_base(state, state.openai_serving_models.base_model_paths[0].name)


def rename_base(state: State, name: str) -> list[str]:
    """Serves the base model as `name` from now on; of its older names only those that `keep_names`
    was given stay.
    """
    paths: list[Any] = state.openai_serving_models.base_model_paths
    kept = [kept_name for kept_name in getattr(state, "lockstep_kept_names", []) if kept_name != name]
    paths[:] = [type(paths[0])(name=served, model_path=paths[0].model_path) for served in [name, *kept]]
    return [name, *kept]


def unknown_name(asked: str, served: Sequence[str]) -> str:
    """The text of a 404.

    served: versions of the model, the current one last.
    """
    name, _, step = asked.rpartition("@")
    gone = step.isdecimal() and any(other.rpartition("@")[0] == name for other in served)
    others = f" ({', '.join(served[:-1])} too)" if served[:-1] else ""
    return (
        f"The model `{asked}` {'is no longer served' if gone else 'does not exist'}: "
        f"ask for model.inference_name(), which is {served[-1]} now{others}"
    )


def apply() -> None:
    """Names the versions that are served in vLLM's answer to an unknown name. Called once, in the
    API process.
    """
    from http import HTTPStatus

    from vllm.entrypoints.serve.engine.protocol import ErrorResponse
    from vllm.entrypoints.serve.engine.serving import BaseServing

    original = BaseServing._check_model

    async def check_model(self, request: Any) -> Any:
        answer = await original(self, request)
        if isinstance(answer, ErrorResponse) and answer.error.code == HTTPStatus.NOT_FOUND.value:
            answer.error.message = unknown_name(str(request.model), _served(self.models))
        return answer

    BaseServing._check_model = check_model


def _served(models: Any) -> list[str]:
    """Names that requests may ask for, the current version last: the adapters', or the base
    weights' if there are none.
    """
    if models.lora_requests:
        return sorted(models.lora_requests, key=_step)
    return [path.name for path in reversed(models.base_model_paths)]


def _step(name: str) -> int:
    step = name.rpartition("@")[2]
    return int(step) if step.isdecimal() else -1
