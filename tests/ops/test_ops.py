"""weighted_lora in rank space against its definition: value and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_sapt.ops import rank_scales, reference, weighted_lora

SHAPES = {"odd": (3, 7, 11, 13), "one token": (4, 1, 9, 5), "no sequence": (5, None, 6, 7), "one row": (1, 4, 5, 3)}


def problem(count: int, shape: tuple[int, int | None, int, int], mixed: bool, per_token: bool = False):
    """Random x, base, blocks, weights and scalings in fp64; weights differ in every row."""
    batch, length, d, out = shape
    lead = (batch,) if length is None else (batch, length)
    ranks = [1 + (3 * t) % 5 if mixed else 4 for t in range(count)]
    alphas = [8.0 * (1 + t % 3) if mixed else 32.0 for t in range(count)]
    tensors = {
        "x": torch.randn(*lead, d),
        "base": torch.randn(*lead, out),
        "scores": torch.randn(*(lead if per_token else (batch,)), count),
    }
    blocks = [(torch.randn(r, d), torch.randn(out, r)) for r in ranks]
    leaves = {k: v.double().requires_grad_() for k, v in tensors.items()}
    blocks = [(a.double().requires_grad_(), b.double().requires_grad_()) for a, b in blocks]
    return leaves, blocks, [a / r for a, r in zip(alphas, ranks, strict=True)]


def fast(leaves, blocks, scaling, **kwargs):
    *old, (a, b) = blocks
    old_a = torch.cat([block[0] for block in old]) if old else None
    old_b = torch.cat([block[1].T for block in old]) if old else None
    weights = leaves["scores"].softmax(dim=-1)
    ranks = [block[0].shape[0] for block in old]
    return weighted_lora(leaves["x"], leaves["base"], old_a, old_b, a, b.T, weights, scaling, ranks, **kwargs)


def slow(leaves, blocks, scaling, **kwargs):
    weights = leaves["scores"].softmax(dim=-1)
    return reference.weighted_lora(
        leaves["x"], leaves["base"], [a for a, _ in blocks], [b for _, b in blocks], weights, scaling, **kwargs
    )


@pytest.mark.parametrize("old_gradient", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_value_and_gradients_are_those_of_the_definition(count, shape, mixed, old_gradient) -> None:
    leaves, blocks, scaling = problem(count, SHAPES[shape], mixed)
    wanted = [*leaves.values(), *(t for block in blocks for t in block)]
    results = [f(leaves, blocks, scaling, old_gradient=old_gradient) for f in (fast, slow)]
    assert (results[0] - results[1]).abs().max() <= 1e-10
    direction = torch.randn_like(results[1])
    grads = [torch.autograd.grad((r * direction).sum(), wanted) for r in results]
    for mine, theirs in zip(*grads, strict=True):
        assert (mine - theirs).abs().max() <= 1e-10


def test_weights_per_token() -> None:
    leaves, blocks, scaling = problem(3, SHAPES["odd"], mixed=True, per_token=True)
    assert (fast(leaves, blocks, scaling) - slow(leaves, blocks, scaling)).abs().max() <= 1e-10


def test_frozen_blocks_get_no_gradient_and_no_wide_activations_are_saved() -> None:
    leaves, blocks, scaling = problem(16, (4, 32, 64, 64), mixed=False)
    for a, b in blocks[:-1]:
        a.requires_grad_(False), b.requires_grad_(False)
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = fast(leaves, blocks, scaling)
    factors = sum(t.nbytes for block in blocks for t in block) * 2
    x, h = leaves["x"].nbytes, 4 * 32 * 16 * 4 * 8
    assert sum(saved.values()) <= x + factors + 5 * h, "an activation as wide as the layer was kept per block"
    y.sum().backward()
    assert all(a.grad is None and b.grad is None for a, b in blocks[:-1])
    assert blocks[-1][0].grad is not None


@settings(max_examples=60)
@given(
    weights=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    ranks=st.lists(st.integers(1, 6), min_size=8, max_size=8),
)
def test_gates_repeat_each_weight_over_its_ranks(weights: list[float], ranks: list[int]) -> None:
    ranks = ranks[: len(weights)]
    scaling = [1.0 + i for i in range(len(weights))]
    scales = rank_scales(torch.tensor([weights], dtype=torch.float64), scaling, ranks)[0].tolist()
    expected = [w * s for w, s, r in zip(weights, scaling, ranks, strict=True) for _ in range(r)]
    assert scales == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scaling", [[2.0] * 40, [2.0] * 20 + [1.0] * 20, [1.0 + t for t in range(40)]])
@pytest.mark.parametrize("ranks", [[3] * 40, [1 + t % 5 for t in range(40)]])
def test_gates_of_long_pools(scaling: list[float], ranks: list[int]) -> None:
    weights = torch.rand(2, 3, 40, dtype=torch.float64, requires_grad=True)
    scales = rank_scales(weights, scaling, ranks)
    expected = torch.stack([weights[..., t] * scaling[t] for t in range(40) for _ in range(ranks[t])], dim=-1)
    assert torch.equal(scales, expected)
    found, wanted = (torch.autograd.grad(g.square().sum(), weights)[0] for g in (scales, expected))
    torch.testing.assert_close(found, wanted)


def test_disagreeing_arguments_are_named() -> None:
    leaves, blocks, scaling = problem(3, SHAPES["odd"], mixed=False)
    with pytest.raises(ValueError, match="2 scalings"):
        fast(leaves, blocks, scaling[:2])
    with pytest.raises(ValueError, match="rows"):
        fast({**leaves, "scores": leaves["scores"][:2]}, blocks, scaling)
