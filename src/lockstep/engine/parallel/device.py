"""The one place that knows whether there is a GPU: Megatron's start-up, process groups, the device
and its memory.

Without CUDA two functions of `torch.cuda` get a meaning that suits Megatron-Core, which asks for
the current device and synchronises it. Its `torch.compile` decorators are switched off: they would
import torch's compiler into each rank. Both happen here, before any other Megatron import; nothing
else is patched. Import this module first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from lockstep.config import deadlines
from lockstep.config.megatron import Parallel
from lockstep.engine.parallel.launch import group_settings
from lockstep.errors import ConfigError, TrainerError
from lockstep.process.free_memory import host_available

CUDA = torch.cuda.is_available()

if not CUDA:
    torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.synchronize = lambda *_args, **_kwargs: None


@contextlib.contextmanager
def _decorators_off() -> Iterator[None]:
    """`torch.compile` leaves every function as it is while this is open."""
    compiler = torch.compile

    def plain(function: Callable[..., object] | None = None, **_options: object) -> object:
        return (lambda decorated: decorated) if function is None else function

    torch.compile = plain  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.compile = compiler


# The package itself imports all of its decorated functions, so its own switch would come too late.
with contextlib.nullcontext() if CUDA else _decorators_off():
    import megatron.core.jit

if not CUDA:
    megatron.core.jit.disable_jit_fuser()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if CUDA else torch.device("cpu")


def check_world(parallel: Parallel, world: int) -> None:
    """Raise ConfigError unless `world` processes are what these sizes need."""
    if parallel.processes != world:
        raise ConfigError(
            f"parallel sizes tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} x data {parallel.data} "
            f"need {parallel.processes} processes, but {world} were started"
        )


def start(parallel: Parallel, seed: int, timeout_s: float = deadlines.TRAINER_START_S) -> None:
    """Join the process group (gloo or NCCL) and build Megatron's groups. Reads the environment
    torch.distributed.run sets.
    """
    check_world(parallel, int(os.environ["WORLD_SIZE"]))
    if CUDA:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {local} has no GPU: {torch.cuda.device_count()} are visible, {parallel.processes} processes were started"
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group("nccl" if CUDA else "gloo", timeout=timeout, **group_settings())
    rebuild_groups(parallel, seed)


def rebuild_groups(parallel: Parallel, seed: int) -> None:
    """Megatron's process groups for these sizes; earlier ones are destroyed, so that one process
    can serve several sizes in turn.
    """
    if parallel_state.model_parallel_is_initialized():
        # Megatron only forgets its groups; each one keeps threads and sockets until it is
        # destroyed.
        groups = [group for group in parallel_state._global_process_group_list or [] if group is not None]
        parallel_state.destroy_model_parallel()
        for group in groups:
            if group is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=False,
    )
    torch.manual_seed(seed)
    # Dropout is always 0 and weights come from files, so the tracker that never touches the CUDA
    # generator is right everywhere.
    model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True, force_reset_rng=True)


def free_memory() -> int:
    """Bytes this rank may still allocate: of its GPU, or its share of the host's available memory."""
    return torch.cuda.mem_get_info()[0] if CUDA else host_free()


def host_free() -> int:
    """Bytes this rank may still allocate on the host: its share of what is available."""
    return host_available() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def require_memory(needed: int, what: str) -> None:
    """Raise TrainerError when `needed` bytes do not fit; `what` names them."""
    free = free_memory()
    if needed > free:
        place = f"GPU {torch.cuda.current_device()}" if CUDA else "this host"
        raise TrainerError(
            f"no free memory: {what} needs {needed / 2**30:.2f} GiB and {place} has {free / 2**30:.2f} GiB free; "
            "use a smaller model, more ranks, or free the memory"
        )


def release_memory() -> None:
    """Give the device back what torch keeps of it for later allocations; nothing on a CPU."""
    if CUDA:
        torch.cuda.empty_cache()


def peak_memory() -> int:
    """Largest number of bytes held since the last call, 0 on CPU."""
    if not CUDA:
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak
