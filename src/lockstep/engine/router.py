"""The router of a mixture of experts: which experts each token goes to, and with what weights. In fp32.

Routing replay goes through Megatron-Core's RouterReplay: the choice comes from the rollout, the weights always from the live router,
so the router's gradient is that of the replayed choice. (Megatron's own router can't be used without TransformerEngine: it calls a
function that only exists there.)

Shapes: T tokens of this rank, H hidden, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lockstep.engine.regions import wide
from lockstep.engine.routes import account, recomputing


def _top(scores: Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None) -> Any:
    return scores.topk(topk, dim=1)


class Router(nn.Module):
    """softmax over all experts, then top K; or top K, then softmax over those (`norm_topk_prob`, the same as dividing by their sum)."""

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
        here = torch.cuda.current_device()
        self.picks = torch.zeros(2, dtype=torch.int64, device=here)
        """Replayed picks that this router would not have made, and all replayed picks, since `picks` was last cleared."""
        self.used = torch.zeros((), dtype=torch.int64, device=here)
        """Account of the records that were replayed since then, to be multiplied with the layer's number (`routes.py`)."""

    def forward(
        self,
        x_TH: Tensor,
        routes_TK: Tensor | None,
        counted_T: Tensor | None = None,
        keys_T: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(weights, experts), both `[T, K]`. routes_TK: replay these choices. counted_T: bool, tokens whose replayed picks are
        compared with this router's own. keys_T: int64, what the records are accounted with."""
        logits_TE = F.linear(wide(x_TH), wide(self.weight))
        scores_TE = logits_TE if self.normalise else logits_TE.softmax(-1)
        self.replay.clear_indices()  # the list for Megatron's own recompute would grow with every row
        if routes_TK is None:
            self.replay.clear_router_replay_action()
        else:
            self.replay.set_target_indices(routes_TK)
            self.replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
            if counted_T is not None and not recomputing.get():
                self._compare(scores_TE, routes_TK, counted_T)
        chosen_TK, experts_TK = self.replay.get_replay_topk(scores_TE, self.topk, default_compute_topk=_top)
        if keys_T is not None and not recomputing.get():
            self.used += account(experts_TK, keys_T)
        return (chosen_TK.softmax(-1) if self.normalise else chosen_TK), experts_TK

    @torch.no_grad()
    def _compare(self, scores_TE: Tensor, routes_TK: Tensor, counted_T: Tensor) -> None:
        own_TK = scores_TE.topk(self.topk, dim=1).indices
        differs_TK = (routes_TK[:, :, None] != own_TK[:, None, :]).all(-1)
        self.picks[0] += (differs_TK & counted_T[:, None]).sum()
        self.picks[1] += counted_T.sum() * self.topk
