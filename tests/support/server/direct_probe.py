"""Run by the server's own Python: the direct path against `load_weights`, on vLLM's own model classes.

Arguments: pairs of checkpoint folders, old and new. Prints one line of JSON per pair.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from lockstep_vllm.weight_sync.in_place_load import make_plan
from lockstep_wire.plan import Slot, TensorMeta, WireBucket


def staged(folder, cuts):
    """A checkpoint's weights in buckets: some whole, some cut into boxes along rows or columns, in no order. Buckets, bytes, weights."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors.update(load_file(path))
    boxes = []
    for name, tensor in sorted(tensors.items(), key=lambda pair: hash_of(pair[0])):
        axis = hash_of(name) % tensor.dim()
        step = max(1, -(-tensor.shape[axis] // (1 + hash_of(name) % cuts)))
        for low in range(0, tensor.shape[axis], step):
            box = [(0, size) for size in tensor.shape]
            box[axis] = (low, min(tensor.shape[axis], low + step))
            boxes.append((name, tuple(box)))
    buckets, filled = [], []
    for number, start in enumerate(range(0, len(boxes), 50)):
        slots, parts, offset = [], [], 0
        for name, box in boxes[start : start + 50]:
            part = tensors[name][tuple(slice(*pair) for pair in box)].contiguous()
            meta = TensorMeta(name, part.dtype, tuple(tensors[name].shape))
            slots.append(Slot(meta, box, offset))
            parts.append(part.reshape(-1).view(torch.uint8))
            offset += part.nbytes
        buckets.append(WireBucket(0, number, offset, tuple(slots)))
        filled.append(torch.cat(parts))
    return buckets, filled, tensors


def hash_of(name):
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)


def fresh_model(folder):
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(model=folder, dtype="bfloat16", enforce_eager=True, max_model_len=128).create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
        return initialize_model(vllm_config=config), config


def compare(old, new):
    from vllm.config import set_current_vllm_config

    model, config = fresh_model(old)
    buckets, _, tensors = staged(old, 3)
    metas = {slot.name: slot.meta for bucket in buckets for slot in bucket.slots}
    with set_current_vllm_config(config):
        model.load_weights(tensors.items())
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        plan = make_plan(dict(model.named_parameters()), metas, buckets, model.load_weights)
        staged_once, _, _ = staged(old, 1)
        simple = make_plan(dict(model.named_parameters()), metas, staged_once, model.load_weights)
    untouched = all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    filled = staged(new, 3)[1]
    matched = [plan.matches(number, bytes_N) for number, bytes_N in enumerate(filled)]
    for number, bytes_N in enumerate(filled):
        plan.copy(number, bytes_N)
    reference, config = fresh_model(new)
    with set_current_vllm_config(config):
        reference.load_weights(staged(new, 1)[2].items())
    expected = dict(reference.named_parameters())
    parameters = dict(model.named_parameters())
    return {
        "parameters": len(parameters),
        "weights": len(metas),
        "copies": len(plan),
        "copies_of_whole": len(simple),
        "untouched": untouched,
        "matched_before": sum(matched),
        "matched_after": all(plan.matches(number, bytes_N) for number, bytes_N in enumerate(filled)),
        "differing": [name for name in expected if not torch.equal(expected[name], parameters[name])],
        "unchanged": [name for name in expected if torch.equal(before[name], parameters[name])],
    }


if __name__ == "__main__":
    for pair in range(1, len(sys.argv), 2):
        sys.stdout.write("RESULT " + json.dumps(compare(sys.argv[pair], sys.argv[pair + 1])) + "\n")
