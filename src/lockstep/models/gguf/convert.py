"""`lockstep import-gguf`: a GGUF file as a Hugging Face folder, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from lockstep.errors import ConfigError, WeightsError
from lockstep.models.checkpoint.read import open_checkpoint
from lockstep.models.gguf.file import read_gguf
from lockstep.models.gguf.tokenizer import tokenizer_of
from lockstep.models.gguf.weights import model_config, tensors
from lockstep.models.registry import get_model_support_handler, load_model_config
from lockstep.process.durable import fsync_all

_SHARD_BYTES = 4 << 30


def import_gguf(
    file: Path,
    folder: Path,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write `folder`: config, dequantized weights, tokenizer, chat template and generation config.
    Returns it.

    file: a GGUF file of an architecture in `gguf_model.ARCHITECTURES`.
    folder: a new one; nothing appears there before all is written and checked.
    dtype: the weights are rounded to it once.
    say: called with a line now and then.

    Raises ConfigError, UnsupportedModelError or WeightsError.
    """
    folder = folder.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty: give a new folder")
    say(f"reading {file}")
    source = read_gguf(file)
    config, tokenizer = model_config(source, dtype), tokenizer_of(source)
    if len(tokenizer) > config.vocab_size:
        raise WeightsError(f"{file}: the tokenizer has {len(tokenizer)} tokens, the embedding {config.vocab_size} rows")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        _write_weights(tensors(source, config, _teller(say)), partial, dtype)
        config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _generation_config(config).save_pretrained(partial)
        say("checking what was written")
        open_checkpoint(partial, get_model_support_handler(str(partial)), load_model_config(str(partial)))
        fsync_all(partial)
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _teller(say: Callable[[str], None]) -> Callable[[int, int], None]:
    """Says how far it is at every quarter."""

    def on_tensor(done: int, total: int) -> None:
        if done * 4 // total > (done - 1) * 4 // total:
            say(f"converted {done} of {total} tensors")

    return on_tensor


def _write_weights(named, folder: Path, dtype: str) -> None:
    """Into safetensors files of some gigabytes each, with an index where there are several."""
    import json

    import torch
    from safetensors.torch import save_file

    files: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        save_file(pending, folder / f"part-{len(files)}.safetensors", metadata={"format": "pt"})
        files.append(list(pending))
        pending.clear()

    for name, array in named:
        pending[name] = torch.from_numpy(array.copy()).to(getattr(torch, dtype)).contiguous()
        if sum(tensor.nbytes for tensor in pending.values()) >= _SHARD_BYTES:
            flush()
    if pending:
        flush()
    if len(files) == 1:
        (folder / "part-0.safetensors").rename(folder / "model.safetensors")
        return
    index: dict[str, str] = {}
    for number, names in enumerate(files):
        shard = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / shard)
        index |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2))


def _generation_config(config):
    from transformers import GenerationConfig

    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(**tokens)
