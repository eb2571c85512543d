"""The process groups a rank belongs to, as Megatron-Core built them. With one process each has size
one.

tensor: ranks that share a layer's matrices. pipeline: stages. context: same weights and rows, other
tokens. data: same weights, other rows. replicas: context and data together. expert: ranks among
which whole experts are split. expert_tensor: ranks that share one expert's matrices. expert_data:
ranks that hold the same experts and see other tokens.
"""

from __future__ import annotations

from typing import cast

from megatron.core import parallel_state
from torch.distributed import ProcessGroup


def tensor() -> ProcessGroup:
    return cast(ProcessGroup, parallel_state.get_tensor_model_parallel_group())


def pipeline() -> ProcessGroup:
    return cast(ProcessGroup, parallel_state.get_pipeline_model_parallel_group())


def data() -> ProcessGroup:
    return cast(ProcessGroup, parallel_state.get_data_parallel_group())


def context() -> ProcessGroup:
    return cast(ProcessGroup, parallel_state.get_context_parallel_group())


def replicas() -> ProcessGroup:
    return cast(ProcessGroup, parallel_state.get_data_parallel_group(with_context_parallel=True))


def expert() -> ProcessGroup:
    return cast(ProcessGroup, parallel_state.get_expert_model_parallel_group())


def expert_tensor() -> ProcessGroup:
    return cast(ProcessGroup, parallel_state.get_expert_tensor_parallel_group())


def expert_data() -> ProcessGroup:
    return cast(ProcessGroup, parallel_state.get_expert_data_parallel_group())


def embedding() -> ProcessGroup:
    """First and last pipeline stage."""
    return cast(ProcessGroup, parallel_state.get_embedding_group())


def first_of_replica() -> bool:
    """True on one rank of each copy of the model: the copies see other rows."""
    ranks = (tensor().rank(), pipeline().rank(), parallel_state.get_context_parallel_rank())
    return ranks == (0, 0, 0)


def previous_stage() -> int:
    """Global rank of this rank's partner on the stage before."""
    return parallel_state.get_pipeline_model_parallel_prev_rank()


def next_stage() -> int:
    """Global rank of this rank's partner on the stage after."""
    return parallel_state.get_pipeline_model_parallel_next_rank()


def last_stage() -> int:
    """Global rank of this rank's partner on the last stage."""
    return cast(int, parallel_state.get_pipeline_model_parallel_last_rank())
