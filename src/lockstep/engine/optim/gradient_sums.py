"""The ranks whose gradients of a parameter are parts of one sum, as a table.

Every rank's backward pass gives the gradient of the loss of its own rows. Some parameters that are
equal on all tensor-parallel ranks see only part of the work there: a share of the sequence, or of
the heads. Their gradients are summed over those ranks. Everything is then summed over the context-
and data-parallel ranks; experts over the ranks that hold the same experts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from torch.distributed import ProcessGroup

from lockstep.config.megatron import Parallel
from lockstep.engine.optim.trainable import Trainable
from lockstep.engine.parallel import groups

Sum = Literal["none", "tensor", "expert_tensor", "embedding"]
When = Literal["always", "sequence", "stages"]


@dataclass(frozen=True)
class Rule:
    """Parameters whose name matches `pattern` are summed over `over`. "sequence": only under
    sequence parallelism. "stages": only when a tied embedding lives on two pipeline stages.
    """

    pattern: str
    over: Sum
    when: When
    why: str


RULES = (
    Rule(
        r"experts\.w1_adapter\.lora_A\.", "expert_tensor", "always", "each ETP rank multiplies it by its own rows of B"
    ),
    Rule(r"experts\.w2_adapter\.lora_B\.", "expert_tensor", "always", "each ETP rank feeds it its own columns of A"),
    Rule(r"mlp\.router\.weight$", "tensor", "always", "experts always work on sequence shards"),
    Rule(r"shared_experts\.gate_weight$", "tensor", "always", "experts always work on sequence shards"),
    Rule(
        r"shared_experts\.linear_fc1\.adapter\.lora_A\.", "tensor", "always", "experts always work on sequence shards"
    ),
    Rule(
        r"shared_experts\.linear_fc2\.adapter\.lora_B\.", "tensor", "always", "experts always work on sequence shards"
    ),
    Rule(r"\.[qk]_layernorm\.weight$", "tensor", "always", "each TP rank has its own heads"),
    Rule(r"self_attention\.norm\.weight$", "tensor", "always", "each TP rank has its own linear-attention heads"),
    Rule(
        r"in_proj_\w+\.adapter\.lora_A\.",
        "tensor",
        "always",
        "one gather serves all projections; B's rows are the rank's own",
    ),
    Rule(r"layernorm\.weight$", "tensor", "sequence", "norms of the stream see a sequence shard"),
    Rule(r"(linear_qkv|linear_fc1)\.adapter\.lora_A\.", "tensor", "sequence", "A is applied before the gather"),
    Rule(
        r"(linear_proj|linear_fc2|out_proj)\.adapter\.lora_B\.", "tensor", "sequence", "B is applied after the scatter"
    ),
    Rule(
        r"^(embedding\.word_embeddings|output_layer)\.weight$",
        "embedding",
        "stages",
        "one tied matrix, used at both ends",
    ),
)


def sum_over(name: str, parallel: Parallel, tied: bool) -> Sum:
    """Over which ranks the gradient of the parameter `name` must be summed before data parallelism.
    First matching rule decides.
    """
    holds = {"always": True, "sequence": parallel.sequence_parallel, "stages": tied and parallel.pipeline > 1}
    for rule in RULES:
        if holds[rule.when] and re.search(rule.pattern, name):
            return rule.over
    return "none"


def sum_group(over: Sum) -> ProcessGroup | None:
    """The process group of a sum, None when there is nothing to add up."""
    if over == "none":
        return None
    group = {"tensor": groups.tensor, "expert_tensor": groups.expert_tensor, "embedding": groups.embedding}[over]()
    return None if group.size() == 1 else group


def replica_group(trainable: Trainable) -> ProcessGroup:
    """The ranks that hold the same part of this parameter and see different rows, or different
    tokens of them.
    """
    if trainable.domain.startswith("expert"):
        return groups.expert_data()
    return groups.replicas()


def counts_here(trainable: Trainable, over: Sum) -> bool:
    """True on one of the ranks that hold the same part, so that the global norm counts every
    element once (replicas aside).
    """
    if over == "embedding" and trainable.name.startswith("output_layer"):
        return False
    if trainable.domain == "replicated":
        return groups.tensor().rank() == 0
    if trainable.domain == "expert":
        return groups.expert_tensor().rank() == 0
    return True
