"""Chunked vocabulary head against the dense computation: values, entropy, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.engine.layers import lm_head


def dense(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, temperature: torch.Tensor, vocab: int):
    z = hidden @ weight[:vocab].T / temperature[:, None]
    log_p = z.log_softmax(-1)
    return log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 40),
    vocab=st.integers(2, 70),
    padding=st.integers(0, 3),
    chunk=st.integers(1, 9),
)
@pytest.mark.usefixtures("groups")
def test_matches_dense(seed: int, tokens: int, vocab: int, padding: int, chunk: int) -> None:
    from megatron.core import parallel_state

    torch.manual_seed(seed)
    hidden = torch.randn(50, 1, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab + padding, 12, dtype=torch.float64, requires_grad=True)
    predictor = torch.randint(0, 50, (tokens,))
    target = torch.randint(0, vocab, (tokens,))
    temperature = torch.rand(tokens, dtype=torch.float64) + 0.3
    before, lm_head.CHUNK_BYTES = lm_head.CHUNK_BYTES, chunk * vocab * 8
    try:
        group = parallel_state.get_tensor_model_parallel_group()
        outputs = lm_head.linear_logprob(hidden, weight, predictor, target, temperature, vocab, group, False)
        slope = torch.randn(2, tokens, dtype=torch.float64)
        gradients = torch.autograd.grad((outputs[0] * slope[0] + outputs[1] * slope[1]).sum(), (hidden, weight))
    finally:
        lm_head.CHUNK_BYTES = before
    expected = dense(hidden[predictor, 0], weight, target, temperature, vocab)
    wanted = torch.autograd.grad((expected[0] * slope[0] + expected[1] * slope[1]).sum(), (hidden, weight))
    for a, b in zip((*outputs, *gradients), (*expected, *wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("groups")
def test_no_scored_token_still_has_a_gradient() -> None:
    from megatron.core import parallel_state

    hidden = torch.randn(5, 1, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    group = parallel_state.get_tensor_model_parallel_group()
    logprob, entropy = lm_head.linear_logprob(hidden, torch.randn(7, 4), none, none, torch.zeros(0), 7, group, False)
    assert logprob.shape == entropy.shape == (0,)
    logprob.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("groups")
def test_extreme_logits_stay_finite() -> None:
    from megatron.core import parallel_state

    hidden = torch.tensor([[[300.0, -300.0]]], requires_grad=True)
    weight = torch.tensor([[300.0, 0.0], [0.0, 300.0], [0.0, 0.0]])
    spans = torch.tensor([0, 0]), torch.tensor([0, 1])
    group = parallel_state.get_tensor_model_parallel_group()
    logprob, entropy = lm_head.linear_logprob(hidden, weight, *spans, torch.ones(2), 3, group, False)
    assert logprob.tolist() == [0.0, -180000.0]
    assert entropy.tolist() == [0.0, 0.0]
    (logprob + entropy).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 30),
    vocab=st.integers(2, 40),
    count=st.integers(1, 5),
    chunk=st.integers(1, 9),
)
@pytest.mark.usefixtures("groups")
def test_most_likely_tokens_match_dense(seed: int, tokens: int, vocab: int, count: int, chunk: int) -> None:
    from megatron.core import parallel_state

    torch.manual_seed(seed)
    hidden, weight = torch.randn(50, 1, 12, dtype=torch.float64), torch.randn(vocab + 3, 12, dtype=torch.float64)
    predictor = torch.randint(0, 50, (tokens,))
    before, lm_head.CHUNK_BYTES = lm_head.CHUNK_BYTES, chunk * vocab * 8
    try:
        group = parallel_state.get_tensor_model_parallel_group()
        ids, logprobs = lm_head.most_likely(hidden, weight, predictor, count, vocab, group, False)
    finally:
        lm_head.CHUNK_BYTES = before
    assert ids.shape == (tokens, count)
    dense, expected = (hidden[predictor, 0] @ weight[:vocab].T).log_softmax(1).topk(min(count, vocab), dim=1)
    assert torch.equal(ids[:, : expected.shape[1]], expected)
    assert (ids[:, expected.shape[1] :] == -1).all()
    torch.testing.assert_close(logprobs[:, : expected.shape[1]], dense)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), widths=st.lists(st.integers(0, 30), min_size=1, max_size=5), count=st.integers(1, 20)
)
def test_the_best_of_shards_are_the_best_of_all(seed: int, widths: list[int], count: int) -> None:
    """However the vocabulary is cut, also into shards with fewer than `count` tokens or none."""
    vocab = sum(widths)
    logits = torch.randn(7, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    starts = [sum(widths[:number]) for number in range(len(widths))]
    parts = [lm_head.best_of_shard(z, start, count) for z, start in zip(logits.split(widths, 1), starts, strict=True)]
    _, best = lm_head.best_of_all(*(torch.cat(columns, 1) for columns in zip(*parts, strict=True)), count)
    ranked = logits.argsort(1, descending=True)[:, :count]
    assert torch.equal(best[:, : ranked.shape[1]], ranked)
    assert (best[:, ranked.shape[1] :] == -1).all()
