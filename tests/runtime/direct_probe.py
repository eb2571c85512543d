"""Run by the server's own Python: the direct path against `load_weights`, on vLLM's own model classes.

Arguments: pairs of checkpoint folders, old and new. Prints one line of JSON per pair.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def staged(folder):
    """Every weight of a checkpoint, as views of one bucket of bytes."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors.update(load_file(path))
    sizes = [tensor.nbytes for tensor in tensors.values()]
    bucket_N = torch.zeros(sum(-(-size // 64) * 64 for size in sizes), dtype=torch.uint8)
    views, offset = {}, 0
    for name, tensor in tensors.items():
        views[name] = bucket_N[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        views[name].copy_(tensor)
        offset += -(-tensor.nbytes // 64) * 64
    return bucket_N, views


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

    from lockstep_vllm.direct import make_plan

    model, config = fresh_model(old)
    bucket_N, views = staged(old)
    with set_current_vllm_config(config):
        plan = make_plan(dict(model.named_parameters()), [bucket_N], lambda: model.load_weights(views.items()))
    bucket_N.copy_(staged(new)[0])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plan.copy()
    reference, config = fresh_model(new)
    with set_current_vllm_config(config):
        reference.load_weights(staged(new)[1].items())
    expected = dict(reference.named_parameters())
    found = dict(model.named_parameters())
    return {
        "parameters": len(found),
        "copies": len(plan),
        "differing": [name for name in expected if not torch.equal(expected[name], found[name])],
        "unchanged": [name for name in expected if torch.equal(before[name], found[name])],
    }


if __name__ == "__main__":
    for pair in range(1, len(sys.argv), 2):
        sys.stdout.write("RESULT " + json.dumps(compare(sys.argv[pair], sys.argv[pair + 1])) + "\n")
