"""Numbers of the official release, reproduced: weights, logits, losses, gradients, KL terms, generated tokens.

The folder is named by PEFT_SAPT_GOLDEN, or found beside the project as ../shared/golden. Every
``<model>_T<k>.safetensors`` in it is covered. The release lists the current task first; a pool lists it last.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from peft_sapt import SaptConfig
from peft_sapt.pool import linear_from
from peft_sapt.reflection.objective import replay_divergence

FOLDER = Path(os.environ.get("PEFT_SAPT_GOLDEN") or Path(__file__).parents[2] / "shared" / "golden")
FILES = sorted(path.stem for path in FOLDER.glob("*_T*.safetensors")) if FOLDER.is_dir() else []
needs_golden = pytest.mark.skipif(
    not FILES, reason=f"no golden fixtures at {FOLDER}: set PEFT_SAPT_GOLDEN to their folder"
)
pytestmark = needs_golden
PADDING_CASES = {"nopad": False, "bs1": False, "pad": True}


def read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as stream:
        return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118


def base_model(kind: str, tensors: dict[str, Tensor]) -> PreTrainedModel:
    if kind.startswith("llama"):
        config = LlamaConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=1,
            bos_token_id=1,
            eos_token_id=2,
            rms_norm_eps=1e-6,
        )
        model: PreTrainedModel = LlamaForCausalLM(config)
    else:
        gated = kind.startswith("t5v11")
        config = T5Config(
            vocab_size=100,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            feed_forward_proj="gated-gelu" if gated else "relu",
            tie_word_embeddings=not gated,
        )
        model = T5ForConditionalGeneration(config)
        if gated:  # transformers 5 ties the head of every T5
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            model.config.tie_word_embeddings = False
            model.config.scale_decoder_outputs = False
    state = {name.removeprefix("base."): t for name, t in tensors.items() if name.startswith("base.")}
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    left = [n for n in result.missing_keys if "embed_tokens" not in n and "lm_head" not in n]
    assert not left, left
    return model


def golden_pool(stem: str, **config) -> tuple[PeftModel, dict[str, Tensor]]:
    """The pool of a fixture, oldest task first, and the fixture's tensors."""
    kind, count = stem.rsplit("_T", 1)
    base, pool = read(FOLDER / f"{kind}_base.safetensors"), read(FOLDER / f"{stem}.safetensors")
    task_type = "CAUSAL_LM" if kind.startswith("llama") else "SEQ_2_SEQ_LM"
    tasks = [f"task_{i}" for i in range(int(count))]
    settings = SaptConfig(task_type=task_type, r=4, lora_alpha=32, tasks=tasks, **config)
    model = get_peft_model(base_model(kind, base), settings)
    attention = model.base_model.attention
    with torch.no_grad():
        attention.sapt_query_down["default"].weight.copy_(base["router.trans_input.0.weight"])
        attention.sapt_query_up["default"].weight.copy_(base["router.trans_input.1.weight"])
        attention.sapt_query_norm["default"].weight.copy_(base["router.trans_input.3.weight"])
        attention.sapt_query_norm["default"].bias.copy_(base["router.trans_input.3.bias"])
        fill(attention, "sapt_key", list(pool["router.keys"].flip(0).split(1)))
        for path, layer in lora_layers(model).items():
            fill(layer, "sapt_A", list(pool[f"lora.{path}.A"].flip(0)))
            fill(layer, "sapt_B", [b.T for b in pool[f"lora.{path}.B"].flip(0)])
    return model.train(), pool


def fill(module, name: str, parts: list[Tensor]) -> None:
    old_name = module.stacks[name]
    getattr(module, name)["default"].weight.copy_(parts[-1])
    if len(parts) > 1:
        getattr(module, old_name)["default"] = linear_from(torch.cat(parts[:-1]))


def lora_layers(model: PeftModel) -> dict[str, torch.nn.Module]:
    return {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "sapt_A")}


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
        loss = replay_divergence(attention.log_weights(pooled, "default"), target)
        torch.testing.assert_close(loss, golden, atol=1e-5, rtol=0)
        loss.backward()
        row = {n: g[t] for n, g in pool.items() if n.startswith(f"{case}.kl.grad.")}
        assert assert_gradients(our_gradients(model), row, f"{case}.kl.grad.") >= 5
