"""The checks before any process starts. Each refusal is one line with the setting, its value, the
reason and the remedy.
"""

from __future__ import annotations

import difflib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.backends.megatron.plan.capacity import GIB, WIDTH, Footprint
from lockstep.errors import ConfigError, UnsupportedModelError
from lockstep.metrics.names import EARLIER, METRICS, USERS, is_known
from lockstep.models.parallel_sizes import check_parallel
from lockstep.models.targets import check_targets
from lockstep.process.child import visible_gpus
from lockstep.process.free_memory import DeviceMemory, disk_free, gpu_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lockstep.backends.megatron.plan.placement import Devices
    from lockstep.config.lora import LoraConfig
    from lockstep.config.megatron import Parallel
    from lockstep.inference.tokenizer_files import TokenizerFiles
    from lockstep.models.config import ModelConfig
    from lockstep.models.contract import Shard
    from lockstep.models.spec import ModelSupportSpec
    from lockstep.runs.retention import Retention

_STATE_BYTES = 12
"""Per trained element: an fp32 master and two fp32 moments."""
_UTILIZATION = 0.9


def check_tokenizer(tokenizer: TokenizerFiles, config: ModelConfig) -> None:
    """Raise UnsupportedModelError without a chat template, or for a tokenizer with ids that the
    embedding has no row for.
    """
    if tokenizer.template is None:
        raise UnsupportedModelError(
            f"{tokenizer.folder} has no chat template, and rollouts are chats: put a chat_template.jinja into the folder, or "
            'name one: server_args = ["--chat-template", "FILE"]'
        )
    if not tokenizer.tokens:
        return
    token, largest = max(tokenizer.tokens.items(), key=lambda pair: pair[1])
    if largest >= config.vocab_size:
        raise UnsupportedModelError(
            f"the tokenizer in {tokenizer.folder} is larger than the model's embedding: {token!r} has id {largest}, vocab_size is "
            f"{config.vocab_size}; resize the embedding (resize_token_embeddings), or take the token out"
        )


def check_shape(config: ModelConfig, parallel: Parallel, devices: Devices) -> None:
    """Raise ConfigError for sizes that don't divide the model, in the trainer or in the server."""
    check_parallel(config, parallel)
    ranks = next((ranks for ranks in map(len, devices.servers) if ranks > 1 and config.heads % ranks), 0)
    if ranks:
        raise ConfigError(
            f"placement: the server can't split num_attention_heads = {config.heads} over {ranks} GPUs; give inference a number "
            "that divides it"
        )


def check_lora(lora: LoraConfig | None, spec: ModelSupportSpec, shards: Sequence[Shard]) -> None:
    """Raise ConfigError for a layer that this model does not have, and for a `start_from` that is no
    adapter folder or of another rank or scale.
    """
    if lora is None:
        return
    check_targets(spec, shards, lora.target_modules)
    if lora.start_from is not None:
        file = lora.start_from.expanduser() / "adapter_config.json"
        try:
            theirs = dict(json.loads(file.read_text(encoding="utf-8")))
            rank, alpha = int(theirs["r"]), float(theirs["lora_alpha"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"[model] lora.start_from: {file} can't be read ({error!r}): give a PEFT folder"
            ) from None
        applied = alpha * math.sqrt(rank) if theirs.get("use_rslora") else alpha
        if (rank, applied) != (lora.rank, lora.applied_alpha):
            raise ConfigError(
                f"[model] lora.start_from: {lora.start_from} has rank {rank} and scale {applied / rank:g}, the run rank {lora.rank} "
                f"and scale {lora.applied_alpha / lora.rank:g}: set rank = {rank} and alpha = {alpha:g}"
                + (" with rslora = true" if theirs.get("use_rslora") else "")
            )


def check_length(asked: int, config: ModelConfig, base_model: str, room: int | None) -> None:
    """Raise ConfigError for a max_model_len that the model has no positions for, or that `room`
    tokens of KV cache don't hold.
    """
    if asked > config.max_positions:
        raise ConfigError(
            f"max_model_len = {asked} is more than the {config.max_positions} positions of {base_model}: leave it out, or use at "
            f"most {config.max_positions}"
        )
    if room is not None and asked > room:
        raise ConfigError(
            f"max_model_len = {asked} needs more memory than there is: the server's KV cache holds some {room} tokens; leave it "
            "out, or give the server more or larger GPUs"
        )


def step_bytes(footprint: Footprint, dtype: str, lora: bool) -> tuple[int, int]:
    """Disk of a published step: (its weights, the optimizer's state)."""
    trained = footprint.adapter if lora else footprint.parameters
    return trained * WIDTH[dtype], trained * _STATE_BYTES


def checkpoint_bytes(footprint: Footprint, dtype: str, lora: bool, rule: Retention) -> int:
    """Disk space of a run: the steps it keeps, step 0 of adapters, and the next step before the
    oldest goes.

    Steps that `rule.every` keeps come on top.
    """
    weights, state = step_bytes(footprint, dtype, lora)
    kept = rule.newest + (rule.best is not None) + lora
    return (kept + 1) * weights + (kept + 1 if rule.states else 2) * state


def check_metric(keep_best: str | None) -> None:
    """Raise ConfigError for a metric that no step will ever have.

    Otherwise the rule would keep nothing, without a word.
    """
    if keep_best is None or is_known(EARLIER.get(keep_best, keep_best)):
        return
    close = difflib.get_close_matches(keep_best, METRICS, n=2) or ["greedy_reward"]
    raise ConfigError(
        f"keep_best = {keep_best!r} is no metric: did you mean {' or '.join(close)}? A trajectory's own begin with {USERS}"
    )


def check_disk(path: Path, run: Path, needed: int) -> None:
    """Raise ConfigError unless `needed` bytes, less what the run's steps take already, are free
    where the runs are.
    """
    taken = sum(file.stat().st_size for file in (run / "steps").rglob("*") if file.is_file())
    free = disk_free(path)
    if needed - taken > free:
        raise ConfigError(
            f"path = {str(path)!r}: the checkpoints that a run keeps take {(needed - taken) / GIB:.1f} GiB more, {free / GIB:.1f} "
            "GiB are free; free some, choose another path, or a smaller rank or fewer target_modules"
        )


def check_gpus(devices: Devices, trainer_bytes: int, utilization: float | None) -> dict[int, DeviceMemory]:
    """Memory of the GPUs that say so. Raise ConfigError where other programs left too little.

    trainer_bytes: that each trainer GPU must hold at least.
    utilization: the share of its GPUs that a server with GPUs of its own takes.
    """
    memory = {}
    for number in dict.fromkeys((*devices.trainer, *devices.inference)):
        known = gpu_memory(visible_gpus((number,)))
        if known is not None:
            memory[number] = known
    for number, known in memory.items():
        has = f"GPU {number} has {known.free / GIB:.1f} of {known.total / GIB:.1f} GiB free"
        if number in devices.trainer and trainer_bytes > known.free:
            raise ConfigError(
                f"placement: {has}, the trainer needs {trainer_bytes / GIB:.1f} GiB for weights and optimizer alone; end what else "
                "runs there, or spread the trainer over more GPUs (placement, parallel)"
            )
        if (
            number in devices.inference
            and not devices.colocated
            and known.free < (utilization or _UTILIZATION) * known.total
        ):
            raise ConfigError(
                f"placement: {has}, the server takes {utilization or _UTILIZATION:.0%}; end what else runs there, choose another "
                'GPU, or set server_args = ["--gpu-memory-utilization", "0.5"]'
            )
    return memory
