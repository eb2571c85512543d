"""Sends weights into a server from a process of its own, as the trainer does. Small tools for the tests of the sync."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM


def load(folder):
    """The Hugging Face model of a checkpoint, fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def hf_logprobs(model, tokens: list[int]) -> torch.Tensor:
    """Log-probability of each token after the first."""
    with torch.no_grad():
        logits_SV = model(torch.tensor([tokens])).logits[0].float()
    return torch.log_softmax(logits_SV[:-1], -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def settled(model, tokens: list[int]) -> int:
    """How many of `hf_logprobs` come before the first that hangs on rounding.

    Where a router likes its last pick and the next expert the same to 1e-5, another order of summation may pick the other
    one, in one of some 500,000 tokens. That changes the token, and through its keys and values those behind it.
    """
    choices = getattr(model.config, "num_experts_per_tok", None)
    if choices is None:
        return len(tokens) - 1
    with torch.no_grad():
        routers_LSE = torch.stack(model(torch.tensor([tokens]), output_router_logits=True).router_logits)
    best_LSK = routers_LSE.topk(choices + 1).values
    near_S = ((best_LSK[..., -2] - best_LSK[..., -1]) < 1e-5).any(0)[:-1]
    return int(near_S.nonzero()[0]) if near_S.any() else len(near_S)


def apart(served: list[float], exact: list[float], *, largest: float, mean: float) -> str:
    """What is wrong when two sides' log-probabilities of the same tokens differ by more than these limits; "" when nothing is."""
    off = (torch.tensor(served) - torch.tensor(exact, dtype=torch.float32)).abs()
    if off.max() <= largest and off.mean() <= mean:
        return ""
    return f"differ by {off.max():.3g} at most (allowed {largest:.3g}), by {off.mean():.3g} on average ({mean:.3g})"


def flip_one_bit(monkeypatch, transport):
    """One bit of the fourth bucket that leaves from now on changes on the way, after its digest was taken."""
    send, flips = transport.send, iter([0, 0, 0, 1])

    def flipped(bytes_N):
        bytes_N = bytes_N.clone()
        bytes_N[17] ^= next(flips, 0)
        send(bytes_N)

    monkeypatch.setattr(transport, "send", flipped)


@contextmanager
def on_experts(model, experts_SLK):
    """Runs a Qwen3.5 mixture on given experts, weighted by its own routers; None: as it is."""
    hooks = []
    routers = [] if experts_SLK is None else [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]

    def replay(layer):
        chosen_SK = torch.from_numpy(experts_SLK[:, layer].astype("int64"))

        def replaced(module, inputs, outputs):
            logits_SE = outputs[0]
            weights_SK = logits_SE.softmax(-1, dtype=torch.float32).gather(1, chosen_SK)
            weights_SK = weights_SK / weights_SK.sum(-1, keepdim=True)
            return logits_SE, weights_SK.to(logits_SE.dtype), chosen_SK

        return replaced

    try:
        for layer, router in enumerate(routers):
            hooks.append(router.register_forward_hook(replay(layer)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def checkpoint_weights(model, folder) -> list[tuple[str, torch.Tensor]]:
    """Name and tensor of every weight as the checkpoint on disk names them:

    stacked experts or one tensor per expert.
    """
    stored: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored |= set(file.keys())
    weights: list[tuple[str, torch.Tensor]] = []
    for name, tensor in model.named_parameters():
        experts, is_experts, projection = name.rpartition(".experts.")
        if name in stored or not is_experts:
            weights.append((name, tensor))
            continue
        for expert, matrix in enumerate(tensor):
            parts = {"gate_proj": matrix[: len(matrix) // 2], "up_proj": matrix[len(matrix) // 2 :]}
            for part, rows in ({"down_proj": matrix} if projection == "down_proj" else parts).items():
                weights.append((f"{experts}.experts.{expert}.{part}.weight", rows))
    assert {name for name, _ in weights} == stored
    return weights


def change(model, seed: int, scale: float = 0.1) -> None:
    """A random step on every weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std().nan_to_num(0.1) * scale)
