"""Numbers of the official release, reproduced: weights, logits, losses, gradients, KL terms, generated tokens.

The folder is named by PEFT_SAPT_GOLDEN, or found beside the project as ../shared/golden. Every
``<model>_T<k>.safetensors`` in it is covered. The release lists the current task first; a pool lists it last.
"""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from helpers.golden import FILES, golden_pool, lora_layers, needs_golden
from peft_sapt.arm.objective import replay_divergence

pytestmark = needs_golden
PADDING_CASES = {"nopad": False, "bs1": False, "pad": True}


def forward_inputs(pool: dict[str, Tensor], case: str) -> dict[str, Tensor]:
    names = ("input_ids", "attention_mask", "labels")
    return {name: pool[f"{case}.in.{name}"] for name in names}


def our_gradients(model: PeftModel) -> dict[str, Tensor]:
    """Gradients under the fixture's names."""
    attention = model.base_model.attention
    found = {
        "router.prompt_key": attention.sapt_key["default"].weight.grad,
        "router.trans_input.0.weight": attention.sapt_query_down["default"].weight.grad,
        "router.trans_input.1.weight": attention.sapt_query_up["default"].weight.grad,
        "router.trans_input.3.weight": attention.sapt_query_norm["default"].weight.grad,
        "router.trans_input.3.bias": attention.sapt_query_norm["default"].bias.grad,
    }
    for path, layer in lora_layers(model).items():
        found[f"lora.{path}.A"] = layer.sapt_A["default"].weight.grad
        grad = layer.sapt_B["default"].weight.grad
        found[f"lora.{path}.B"] = None if grad is None else grad.T
    return found


def assert_gradients(ours: dict[str, Tensor], pool: dict[str, Tensor], prefix: str) -> int:
    compared = 0
    for name, golden in pool.items():
        if not name.startswith(prefix):
            continue
        mine = ours[name.removeprefix(prefix)]
        mine = torch.zeros_like(golden) if mine is None else mine
        error, size = (mine - golden).norm(), golden.norm()
        assert error <= 1e-3 * size + 1e-9, f"{name}: |difference| {error:.2e}, |gradient| {size:.2e}"
        compared += 1
    return compared


def check_forward(model: PeftModel, pool: dict[str, Tensor], case: str):
    inputs = forward_inputs(pool, case)
    weights = model.attention_weights(**inputs)
    torch.testing.assert_close(weights, pool[f"{case}.out.router_weights"].flip(1), atol=1e-5, rtol=0)
    out = model(**inputs)
    real = inputs["attention_mask"].bool() if inputs["labels"].shape == inputs["input_ids"].shape else ...
    golden = pool[f"{case}.out.logits"]
    if real is not ... and golden.shape[:2] != inputs["input_ids"].shape:
        real = ...
    torch.testing.assert_close(out.logits[real], golden[real], atol=1e-4, rtol=0)
    torch.testing.assert_close(out.loss, pool[f"{case}.out.loss"].reshape(()), atol=1e-5, rtol=0)
    return out


@pytest.mark.parametrize("case", ["nopad", "bs1"])
@pytest.mark.parametrize("stem", FILES)
def test_weights_logits_and_loss(stem: str, case: str) -> None:
    model, pool = golden_pool(stem)
    check_forward(model, pool, case)


@pytest.mark.parametrize("stem", FILES)
def test_exact_gradients_without_padding(stem: str) -> None:
    model, pool = golden_pool(stem)
    check_forward(model, pool, "nopad").loss.backward()
    assert assert_gradients(our_gradients(model), pool, "nopad.gradfull.") >= 8


@pytest.mark.parametrize("case", ["nopad", "pad"])
@pytest.mark.parametrize("stem", FILES)
def test_release_compatible_mode(stem: str, case: str) -> None:
    model, pool = golden_pool(stem, old_block_gradient=False, pool_padding=True)
    check_forward(model, pool, case).loss.backward()
    assert assert_gradients(our_gradients(model), pool, f"{case}.grad.") >= 8


@pytest.mark.parametrize("case", ["nopad", "bs1", "pad"])
@pytest.mark.parametrize("stem", FILES)
def test_greedy_tokens(stem: str, case: str) -> None:
    model, pool = golden_pool(stem, pool_padding=PADDING_CASES[case])
    prompt = f"{case}.in.input_ids_wo_label"
    ids = pool.get(prompt, pool[f"{case}.in.input_ids"])
    mask = (ids != model.config.pad_token_id).long()
    out = model.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    golden = pool[f"{case}.gen.sequences"]
    assert torch.equal(out[:, : golden.shape[1]], golden)


@pytest.mark.parametrize("case", ["nopad", "pad"])
@pytest.mark.parametrize("stem", [stem for stem in FILES if not stem.endswith("_T1")])
def test_kl_terms_and_their_gradients(stem: str, case: str) -> None:
    model, pool = golden_pool(stem, pool_padding=PADDING_CASES[case])
    if f"{case}.kl.loss" not in pool:
        pytest.fail(f"{stem} has no KL case {case}")
    ids = pool[f"{case}.kl.input_ids"]
    attention = model.base_model.attention
    for t, golden in enumerate(pool[f"{case}.kl.loss"]):
        model.zero_grad()
        rows = ids[t] if ids.dim() == 3 else ids
        mask = (rows != model.config.pad_token_id).long()
        pooled = model.pooled_prompts([{"input_ids": rows, "attention_mask": mask}])
        target = pool[f"{case}.kl.replay_labels"][t].flip(0)
        loss = replay_divergence(attention.log_weights("default", pooled), target)
        torch.testing.assert_close(loss, golden, atol=1e-5, rtol=0)
        loss.backward()
        row = {n: g[t] for n, g in pool.items() if n.startswith(f"{case}.kl.grad.")}
        assert assert_gradients(our_gradients(model), row, f"{case}.kl.grad.") >= 5
