"""Hugging Face's models as the reference, on the CPU: fp32, fp64, their names on disk, and every
module's output.

Shapes: S tokens of a sequence, H hidden or the module's own width.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_KERNELS = "fla"


@contextmanager
def _without_gpu_kernels() -> Iterator[None]:
    """transformers, which imports a model's module here, finds no flash-linear-attention: its
    kernels can't run on a CPU, and are no reference.
    """
    imported = sys.modules.pop(_KERNELS, None)
    sys.modules[_KERNELS] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules[_KERNELS]
        if imported is not None:
            sys.modules[_KERNELS] = imported


def hugging_face(folder: Path) -> Any:
    """The model in fp32, from transformers."""
    from transformers import AutoModelForCausalLM

    with _without_gpu_kernels():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


class _InDouble(TorchFunctionMode):
    """Turns every cast to fp32 into one to fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


def hugging_face_fp64(folder: Path) -> Any:
    """The same model in fp64, also where transformers casts to fp32. The rotary angles stay fp32, as
    every release defines them.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": "sdpa"}
    if "num_experts" in (folder / "config.json").read_text():
        options["experts_implementation"] = "eager"  # grouped_mm has no fp64
    with _without_gpu_kernels():
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    rotary, honest = model.model.rotary_emb.forward, model.forward

    def angles(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        with torch._C.DisableTorchFunction():
            cos, sin = rotary(x.float(), position_ids)
        return cos.double(), sin.double()

    def forward(ids: Tensor) -> Any:
        with _InDouble():
            return honest(ids)

    model.model.rotary_emb.forward, model.forward = angles, forward
    return model


def disk_names(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the one-by-one names of experts that transformers keeps stacked in memory."""
    tensors = dict(named)
    for name, tensor in named.items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, 1)
            for expert in range(len(tensor)):
                base = name.removesuffix("gate_up_proj") + f"{expert}."
                tensors[f"{base}gate_proj.weight"], tensors[f"{base}up_proj.weight"] = gate[expert], up[expert]
        elif name.endswith("experts.down_proj"):
            for expert in range(len(tensor)):
                tensors[name.removesuffix("down_proj") + f"{expert}.down_proj.weight"] = tensor[expert]
    return tensors


def hugging_face_modules(model: Any) -> dict[str, Any]:
    """The modules whose outputs are compared, in the order in which they run."""
    decoder = getattr(model.model, "language_model", model.model)
    modules = {"embedding": decoder.embed_tokens}
    for number, layer in enumerate(decoder.layers):
        mixer = layer.self_attn if hasattr(layer, "self_attn") else layer.linear_attn
        modules |= {
            f"layers.{number}.input_norm": layer.input_layernorm,
            f"layers.{number}.mixer": mixer,
            f"layers.{number}.mlp_norm": layer.post_attention_layernorm,
            f"layers.{number}.mlp": layer.mlp,
            f"layers.{number}": layer,
        }
    return modules | {"final_norm": decoder.norm}


def engine_modules(model: Any) -> dict[str, Any]:
    """The same modules of the engine's model, by the same names."""
    modules = {"embedding": model.embedding}
    for number, layer in enumerate(model.decoder.layers):
        modules |= {
            f"layers.{number}.input_norm": layer.input_layernorm,
            f"layers.{number}.mixer": layer.self_attention,
            f"layers.{number}.mlp_norm": layer.pre_mlp_layernorm,
            f"layers.{number}.mlp": layer.mlp,
            f"layers.{number}": layer,
        }
    return modules | {"final_norm": model.decoder.final_layernorm}


@contextmanager
def recorded(modules: dict[str, Any]) -> Iterator[dict[str, list[Tensor]]]:
    """Each module's outputs `[S, H]` on the CPU, one for every pass, while the block runs."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in modules}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, result: Any) -> None:
            tensor = result[0] if isinstance(result, tuple) else result
            outputs[name].append(tensor.detach().reshape(-1, tensor.shape[-1]).cpu())

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
