"""The supported models, and their support. Reads the families' `spec.py` only; handlers are
imported on first use.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lockstep.errors import ConfigError, UnsupportedModelError
from lockstep.models.checkpoint.hub import checkpoint_folder, is_folder
from lockstep.models.config import ModelConfig, architecture, parse_config, read_json
from lockstep.models.handler import ModelSupportHandler
from lockstep.models.spec import ModelSupportSpec, NativeLoraStatus, RolloutWeightsMode

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSetup:
    """The default training and serving of a base model, known without its weights."""

    base_model: str
    key: str
    is_moe: bool
    target_modules: tuple[str, ...]
    rollout_weights_mode: RolloutWeightsMode
    native_vllm_lora_status: NativeLoraStatus


@cache
def list_model_support_specs() -> tuple[ModelSupportSpec, ...]:
    """Every family's specs, sorted by key: each folder beside this file that has a `spec.py`."""
    families = sorted(path.parent.name for path in Path(__file__).parent.glob("*/spec.py"))
    specs = [spec for family in families for spec in importlib.import_module(f"{__package__}.{family}.spec").SPECS]
    return tuple(sorted(specs, key=lambda spec: spec.key))


def get_model_support_spec_by_key(key: str) -> ModelSupportSpec:
    """The spec with this key. Raises UnsupportedModelError."""
    for spec in list_model_support_specs():
        if spec.key == key:
            return spec
    raise UnsupportedModelError(
        f"no model family {key!r}; known: {', '.join(s.key for s in list_model_support_specs())}"
    )


def get_model_support_spec(base_model: str, *, allow_unvalidated_arch: bool = False) -> ModelSupportSpec:
    """The family of a Hugging Face id or of a local checkpoint folder (by the architecture its
    `config.json` names).

    An unregistered model raises UnsupportedModelError; with `allow_unvalidated_arch` the family
    that looks nearest is tried, with a warning that says so.
    """
    spec = spec_of_folder(Path(base_model).expanduser()) if is_folder(base_model) else _spec_of_name(base_model)
    if spec is not None:
        return spec
    if not allow_unvalidated_arch:
        raise UnsupportedModelError(_unknown(base_model))
    nearest = _nearest(base_model)
    if nearest is None:
        raise UnsupportedModelError(f"no family is near enough to try; {_unknown(base_model)}")
    _LOG.warning(
        "%s is not a validated model; trying it as %s because allow_unvalidated_arch is set", base_model, nearest.key
    )
    return nearest


def is_model_support_registered(base_model: str) -> bool:
    """True when `get_model_support_spec` knows the model."""
    spec = spec_of_folder(Path(base_model).expanduser()) if is_folder(base_model) else _spec_of_name(base_model)
    return spec is not None


def get_model_support_handler(base_model: str, *, allow_unvalidated_arch: bool = False) -> ModelSupportHandler:
    """The engine-facing side of a model's family, imported now."""
    return get_model_support_handler_for_spec(
        get_model_support_spec(base_model, allow_unvalidated_arch=allow_unvalidated_arch)
    )


@cache
def get_model_support_handler_for_spec(spec: ModelSupportSpec) -> ModelSupportHandler:
    """Import the handler that a spec names. Raises ConfigError when an installed dependency is
    older than the family needs.
    """
    check_dependency_floors(spec)
    module, _, attribute = spec.handler.partition(":")
    return getattr(importlib.import_module(module), attribute)


def check_dependency_floors(spec: ModelSupportSpec) -> None:
    """Raise ConfigError naming the first installed distribution below the family's floor. What
    isn't installed isn't checked.
    """
    for floor in spec.dependency_floors:
        try:
            installed = importlib.metadata.version(floor.distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        if _numbers(installed) < _numbers(floor.minimum):
            raise ConfigError(
                f"{spec.key} needs {floor.distribution}>={floor.minimum} ({floor.reason}), "
                f"but {installed} is installed; upgrade it"
            )


def default_target_modules_for_model(base_model: str, *, allow_unvalidated_arch: bool = False) -> list[str]:
    """LoRA targets of a model when the user names none."""
    return list(
        get_model_support_spec(base_model, allow_unvalidated_arch=allow_unvalidated_arch).default_target_modules
    )


def native_vllm_lora_status_for_model(base_model: str, *, allow_unvalidated_arch: bool = False) -> NativeLoraStatus:
    """True if vLLM serves this model's adapters as they are."""
    return get_model_support_spec(base_model, allow_unvalidated_arch=allow_unvalidated_arch).native_vllm_lora_status


def default_rollout_weights_mode_for_model(
    base_model: str, *, allow_unvalidated_arch: bool = False
) -> RolloutWeightsMode:
    """`lora` or `merged` when the user doesn't choose."""
    return get_model_support_spec(
        base_model, allow_unvalidated_arch=allow_unvalidated_arch
    ).default_rollout_weights_mode


def model_requires_merged_rollout(base_model: str, *, allow_unvalidated_arch: bool = False) -> bool:
    """True when vLLM can't serve the model's adapters, so that merged weights must be sent."""
    return native_vllm_lora_status_for_model(base_model, allow_unvalidated_arch=allow_unvalidated_arch) == "disabled"


def model_is_moe(base_model: str, *, allow_unvalidated_arch: bool = False) -> bool:
    """True for mixture-of-experts models."""
    return get_model_support_spec(base_model, allow_unvalidated_arch=allow_unvalidated_arch).is_moe


def model_uses_expert_parallel(base_model: str, *, allow_unvalidated_arch: bool = False) -> bool:
    """True when an expert-parallel size above 1 makes sense."""
    return model_is_moe(base_model, allow_unvalidated_arch=allow_unvalidated_arch)


def get_model_config(base_model: str, *, allow_unvalidated_arch: bool = False) -> ModelSetup:
    """Defaults for training and serving a base model. Needs neither its weights nor a training
    environment.
    """
    spec = get_model_support_spec(base_model, allow_unvalidated_arch=allow_unvalidated_arch)
    return ModelSetup(
        base_model,
        spec.key,
        spec.is_moe,
        spec.default_target_modules,
        spec.default_rollout_weights_mode,
        spec.native_vllm_lora_status,
    )


def load_model_config(base_model: str, *, allow_unvalidated_arch: bool = False) -> ModelConfig:
    """The checked architecture of a base model, from its `config.json` (fetched for a Hugging Face
    id).
    """
    folder = checkpoint_folder(base_model, weights=False)
    spec = get_model_support_spec(str(folder), allow_unvalidated_arch=allow_unvalidated_arch)
    return parse_config(read_json(folder), spec, source=f"{base_model}: config.json")


def _spec_of_name(name: str) -> ModelSupportSpec | None:
    return next((s for s in list_model_support_specs() if name in s.model_names), None)


def spec_of_folder(folder: Path) -> ModelSupportSpec | None:
    """The family whose architecture or model type a checkpoint's config.json names; None: no
    family's.
    """
    raw = read_json(folder)
    named = architecture(raw)
    if named is not None:
        return next((s for s in list_model_support_specs() if named in s.architectures), None)
    return next((s for s in list_model_support_specs() if raw.get("model_type") in s.model_types), None)


def _nearest(base_model: str) -> ModelSupportSpec | None:
    """The family whose name is the longest common start with the model's type or name, dense or MoE
    as the model is.
    """
    if is_folder(base_model):
        raw = read_json(Path(base_model).expanduser())
        text = raw.get("text_config") or raw
        label, moe = str(raw.get("model_type", "")), bool(text.get("num_experts") or text.get("num_local_experts"))
    else:
        label, moe = base_model.rsplit("/", 1)[-1], re.search(r"-A\d+(\.\d+)?B", base_model) is not None
    plain = re.sub(r"[^a-z0-9]", "", label.lower())
    near = [
        (len(stem), spec)
        for spec in list_model_support_specs()
        if spec.is_moe is moe and plain.startswith(stem := re.sub(r"[^a-z0-9]", "", spec.family))
    ]
    return max(near, key=lambda pair: pair[0])[1] if near else None


def _unknown(base_model: str) -> str:
    folder = Path(base_model).expanduser()
    named = f" (architecture {architecture(read_json(folder)) or 'not named'})" if folder.is_dir() else ""
    if not folder.is_dir() and (base_model.count("/") != 1 or base_model[0] in "./~"):
        return f"{base_model} is neither a folder here nor a Hugging Face id (OWNER/NAME)"
    known = "; ".join(f"{s.key}: {', '.join(s.architectures)}" for s in list_model_support_specs())
    return (
        f"{base_model}{named} is not a supported model. Known families: {known}. "
        "A fine-tune of one of them is recognised as a local folder: download it and give its path. To add a family, see "
        "docs/how-to/add-a-model.md; the functions of this module try the nearest one with allow_unvalidated_arch=True"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.match(r"[\d.]*", version).group().strip(".").split(".") if n)  # type: ignore[union-attr]
