"""What a GPU computes in bf16, against Hugging Face in fp32 and bf16 on the same tokens. One program for one or more GPUs:

    torchrun --nproc-per-node N tests/gpu/ranks.py OUT.json [FAMILY or FAMILY/SIZES ...]

Models have 8 layers and the head sizes of the released ones, with random weights. For every family it writes: the mean |difference| of
log-probabilities to Hugging Face fp32 of Hugging Face bf16 ("noise") and of ours unpacked and packed as trees; the same for the
gradient of a LoRA step (ours bf16 against ours fp32); and the metrics of training steps, some of them with rows of other lengths.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lockstep.batching.pack import pack
from lockstep.batching.packed_batch import PackedBatch
from lockstep.batching.prefix_tree import TokenSequence
from lockstep.config.megatron import Parallel
from lockstep.config.train import TrainConfig
from lockstep.engine.parallel import device  # first: prepares torch for Megatron
from lockstep.engine.state import open_trainer
from lockstep.engine.steps.score import score
from lockstep.engine.steps.train_step import train_step
from lockstep.models.registry import get_model_support_handler
from lockstep.models.tiny.write import write_tiny
from lockstep.trainer.protocol import EngineConfig, LoraSettings

LINEAR = {
    "head_dim": 256, "num_attention_heads": 16, "num_key_value_heads": 4, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 3072},
    "qwen3_moe": {"num_attention_heads": 8, "num_key_value_heads": 4, "moe_intermediate_size": 768},
    "qwen3_5": {**LINEAR, "intermediate_size": 3072},
    "qwen3_5_moe": {
        **LINEAR,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
}
COMMON: dict[str, Any] = {"num_hidden_layers": 8, "hidden_size": 1024, "vocab_size": 4096, "dtype": "bfloat16"}


def sequences(rng: np.random.Generator, count: int, prompt: int, reply: int) -> list[TokenSequence]:
    shared = rng.integers(3, 4000, prompt)
    drawn = []
    for number in range(count):
        tokens = np.concatenate([shared, rng.integers(3, 4000, int(rng.integers(reply // 2, reply)))]).astype(np.int32)
        mask = np.arange(len(tokens)) >= prompt
        logprobs = np.where(mask, -8.0, np.nan).astype(np.float32)
        drawn.append(TokenSequence(f"s{number}", tokens, mask, logprobs, np.ones(len(tokens), np.float32), None, None))
    return drawn


def batch_of(drawn: list[TokenSequence], share: bool, row_length: int, data: int) -> PackedBatch:
    ones = np.ones(len(drawn), np.float32)
    advantages = np.linspace(-1, 1, len(drawn)).astype(np.float32)
    return pack(
        drawn,
        advantages,
        ones,
        row_length=row_length,
        seed=0,
        share_prefixes=share,
        minibatches=1,
        data=data,
        multiple=128,
    )


def transformers_without_kernels() -> None:
    """Let transformers resolve its plain torch code: flash-linear-attention's kernels, which it would take, refuse fp32."""
    import importlib

    sys.modules["fla"] = None  # pyright: ignore[reportArgumentType]
    try:
        for name in ("qwen3_5", "qwen3_5_moe"):
            importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    finally:
        del sys.modules["fla"]


def hugging_face(folder: Path, drawn: list[TokenSequence], dtype: torch.dtype) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device.device())
    out = []
    with torch.no_grad():
        for item in drawn:
            ids = torch.from_numpy(item.tokens_S.astype(np.int64)).to(device.device())
            log_p = model(ids[None]).logits[0, :-1].float().log_softmax(-1)
            out.append(log_p.gather(1, ids[1:, None])[:, 0].cpu())
    del model
    torch.cuda.empty_cache()
    return out


def of_sequences(batch: PackedBatch, values_RS: np.ndarray) -> list[torch.Tensor]:
    paths = [(int(batch.row_Q[q]), batch.path_index(q)[1:]) for q in range(len(batch.leaf_Q))]
    return [torch.from_numpy(values_RS[row, path]) for row, path in paths]


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return float((torch.cat(a) - torch.cat(b)).abs().mean())


def check(family: str, parallel: dict[str, Any], folder: Path) -> dict[str, Any]:
    sizes, rng = Parallel(**parallel), np.random.default_rng(0)
    drawn = sequences(rng, 6, 300, 200)
    exact, rounded = hugging_face(folder, drawn, torch.float32), hugging_face(folder, drawn, torch.bfloat16)
    result: dict[str, Any] = {
        "parallel": parallel,
        "noise": distance(rounded, exact),
        "mean": float(torch.cat(exact).mean()),
    }
    device.rebuild_groups(sizes, seed=0)
    targets = tuple(get_model_support_handler(str(folder)).spec.default_target_modules)
    trainer = open_trainer(EngineConfig(str(folder), sizes, dtype="bfloat16", lora=LoraSettings(16, 32.0, targets)))
    for name, share in (("unpacked", False), ("packed", True)):
        batch = batch_of(drawn, share, 2048, sizes.data)
        start = time.perf_counter()
        ours = of_sequences(batch, score(trainer, batch, lambda _event: None))
        result[name] = distance(ours, exact)
        result[f"{name}_seconds"] = time.perf_counter() - start
        result[f"{name}_finite"] = bool(torch.cat(ours).isfinite().all())
    batch = batch_of(drawn, True, 2048, sizes.data)
    config = TrainConfig(learning_rate=1e-3, max_mismatch=None)
    result["steps"] = [train_step(trainer, batch, config, None, lambda _event: None) for _ in range(3)]
    result["steps_of_other_lengths"] = [
        train_step(
            trainer, batch_of(sequences(rng, *sizes_of), True, length, sizes.data), config, None, lambda _event: None
        )
        for sizes_of, length in (((2, 70, 40), 512), ((6, 500, 300), 4096), ((3, 1500, 400), 4096), ((9, 40, 90), 1024))
    ]
    result["after"] = distance(of_sequences(batch, score(trainer, batch, lambda _event: None)), exact)
    result["gradient_norm_fp32"] = gradient_norm_fp32(folder, sizes, targets, batch, config)
    return result


def gradient_norm_fp32(
    folder: Path, sizes: Parallel, targets: tuple[str, ...], batch: PackedBatch, config: TrainConfig
) -> float:
    """The same first step computed in fp32 (plain kernels)."""
    trainer = open_trainer(EngineConfig(str(folder), sizes, dtype="float32", lora=LoraSettings(16, 32.0, targets)))
    return train_step(trainer, batch, config, None, lambda _event: None)["grad_norm"]


def model_folder(family: str) -> Path:
    """The family's model, written once; several of these programs may run at the same time."""
    place = Path(os.environ.get("LOCKSTEP_GPU_MODELS", tempfile.gettempdir())) / "lockstep-gpu-models"
    folder = place / family
    if dist.get_rank() == 0 and not folder.exists():
        place.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(dir=place)) / family
        write_tiny(family, own, seed=0, overrides={**COMMON, **SHAPES[family]})
        with contextlib.suppress(OSError):  # another one was faster: the same bytes
            own.rename(folder)
    dist.barrier()
    return folder


def layouts(family: str, world: int) -> dict[str, dict[str, Any]]:
    """The parallel sizes that are tried on so many GPUs, by name."""
    if world == 1:
        return {"one": {}}
    layouts_found: list[dict[str, Any]] = [{"tensor": world, "sequence": sequence} for sequence in (False, True)]
    if "moe" in family:
        layouts_found.append({"tensor": world, "sequence": True, "expert": world})
    layouts_found.append({"context": world})
    return {"-".join(f"{k}{v}" for k, v in sizes.items()): sizes for sizes in layouts_found}


def main() -> None:
    out, chosen = Path(sys.argv[1]), sys.argv[2:] or list(SHAPES)
    transformers_without_kernels()
    world = int(os.environ["WORLD_SIZE"])
    device.start(Parallel(data=world), seed=0)
    results: dict[str, Any] = {}
    for family, _, sizes in (case.partition("/") for case in chosen):
        folder = model_folder(family)
        for name, parallel in layouts(family, world).items():
            if sizes not in ("", name):
                continue
            results[f"{family}/{name}"] = figures = check(family, parallel, folder)
            if dist.get_rank() == 0:
                print(f"{family}/{name}", {k: v for k, v in figures.items() if k != "steps"}, flush=True)  # noqa: T201
                out.write_text(json.dumps(results, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
