"""The router of a mixture of experts: which experts each token goes to, and with what weights. In
fp32.

Replay uses Megatron-Core's RouterReplay. The choice comes from the rollout, and the weights always
come from the live router. So the router's gradient is that of the replayed choice. (Megatron's own
router can't be used without TransformerEngine: it calls a function that only exists there.)

Shapes: T tokens of this rank, H hidden, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lockstep.engine.layers.compiled_ops import wide
from lockstep.engine.rows.routed_experts import recomputing


def _top(scores: Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None) -> Any:
    return scores.topk(topk, dim=1)


class Router(nn.Module):
    """softmax over all experts, then top K; or top K, then softmax over those (`norm_topk_prob`,
    the same as dividing by their sum).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.num_moe_experts is not None
        self.topk, self.normalise = config.moe_router_topk, not config.moe_router_pre_softmax
        self.weight = nn.Parameter(
            torch.empty(
                config.num_moe_experts,
                config.hidden_size,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        self.replay = RouterReplay()

    def forward(self, x_TH: Tensor, replayed_TK: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(weights, experts, own choices), all `[T, K]`.

        replayed_TK: int64, the choices to replay. With these, and outside a second computation of
            activations, the third result holds this router's own choices, in any order.
        """
        logits_TE = F.linear(wide(x_TH), wide(self.weight))
        scores_TE = logits_TE if self.normalise else logits_TE.softmax(-1)
        self.replay.clear_indices()  # the list for Megatron's own recompute would grow with every row
        own_TK = None
        if replayed_TK is None:
            self.replay.clear_router_replay_action()
        else:
            self.replay.set_target_indices(replayed_TK)
            self.replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
            if not recomputing.get():
                own_TK = scores_TE.detach().topk(self.topk, dim=1, sorted=False).indices
        chosen_TK, experts_TK = self.replay.get_replay_topk(scores_TE, self.topk, default_compute_topk=_top)
        return (chosen_TK.softmax(-1) if self.normalise else chosen_TK), experts_TK, own_TK
