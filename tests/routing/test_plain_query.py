"""The query reads plain embeddings: what training adds to them (noise, dropout, hooks) never reaches the router."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrize

from helpers.steps import ROWS
from helpers.tiny import FAMILIES, padded
from helpers.training import arguments, fresh_pool, trainer
from helpers.words import rows_of, tokenizer
from peft_sapt import ArmCallback, SaptConfig
from peft_sapt.routing import ROUTERS


class Dropped(nn.Module):
    """Token embeddings that are dropped out, in train mode, by a module of their own."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table, self.drop = table, nn.Dropout(0.5)

    @property
    def weight(self) -> nn.Parameter:
        return self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.drop(self.table(ids))


def noise(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output + torch.randn_like(output) if module.training else output


def doubled(module: nn.Module, args: tuple) -> tuple:
    return (args[0].roll(1, dims=1),) if module.training else args


def add_hook(model: nn.Module) -> None:
    model.get_input_embeddings().register_forward_hook(noise)


def add_pre_hook(model: nn.Module) -> None:
    model.get_input_embeddings().register_forward_pre_hook(doubled)


class NoisyWeight(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + torch.randn_like(weight) if self.training else weight


def add_parametrization(model: nn.Module) -> None:
    parametrize.register_parametrization(model.get_input_embeddings(), "weight", NoisyWeight())


def add_dropout(model: nn.Module) -> None:
    model.set_input_embeddings(Dropped(model.get_input_embeddings()))


@pytest.mark.parametrize("habit", [add_hook, add_pre_hook, add_dropout])
@pytest.mark.parametrize("block", ["lora", "prompt"])
@pytest.mark.parametrize("router", list(ROUTERS))
def test_weights_in_training_are_those_of_inference(family: str, router: str, block: str, habit) -> None:
    torch.manual_seed(0)
    task_type, make = FAMILIES[family]
    base = make()
    torch.nn.init.normal_(base.get_input_embeddings().weight)
    expected = copy.deepcopy(base).eval().get_input_embeddings()(padded(ROWS)["input_ids"])
    habit(base)
    fields = {"block": block, "router": router, "init_weights": False}
    pool = get_peft_model(base, SaptConfig(task_type=task_type, tasks=["a", "b", "c"], **fields))
    batch = padded(ROWS)
    inference = pool.eval().attention_weights(**batch)
    assert torch.equal(pool.train().attention_weights(**batch), inference)
    hooks, seen = pool.base_model.hooks, []
    hooks.state.use, use = lambda mixture: (seen.append(mixture.weights.detach()), use(mixture)), hooks.state.use
    labels = (
        torch.full((len(ROWS), 2), 5) if task_type == "SEQ_2_SEQ_LM" else torch.full_like(batch["input_ids"], -100)
    )
    hooks.router_of("default").ready = {"default": "c"}  # a router that is solved counts as fitted
    pool(**batch, labels=labels)
    torch.testing.assert_close(seen[0], inference)
    pooled = hooks.memory.seen("default")[0]
    mask, own = batch["attention_mask"].bool(), hooks.config_of("default")
    reader, base = hooks.reader, hooks.base.get_encoder() if task_type == "SEQ_2_SEQ_LM" else hooks.base
    torch.testing.assert_close(pooled, reader.features(base, own, None, expected, mask, None, remember=False))


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_neftune_through_the_trainer(alpha: float | None, tmp_path) -> None:
    """Pooled prompts and replay rows that ArmCallback stores are those that a prompt has when it asks."""
    model, arm = fresh_pool(), ArmCallback(tokenizer(), replay="rows")
    trainer(model, tmp_path, "a", [arm], neftune_noise_alpha=alpha, max_steps=2).train()
    prompts = [{"input_ids": torch.tensor([row["input_ids"][:-1]])} for row in rows_of("a")]
    clean = model.eval().pooled_prompts(prompts)
    stored = model.base_model.hooks.memory.replay("default")[0]
    assert float((stored.unsqueeze(1) - clean).norm(dim=-1).min(dim=1).values.max()) < 1e-6
    assert arguments(tmp_path).neftune_noise_alpha is None


@pytest.mark.parametrize("habit", [add_hook, add_dropout])
def test_the_pad_embedding_of_the_official_code_is_plain_too(habit) -> None:
    """Under pool_padding it takes part in the maximum of rows that the official code would pad."""
    torch.manual_seed(0)
    base = FAMILIES["llama"][1]()
    torch.nn.init.normal_(base.get_input_embeddings().weight)
    habit(base)
    fields = {"pool_padding": True, "init_weights": False}
    pool = get_peft_model(base, SaptConfig(task_type="CAUSAL_LM", tasks=["a", "b", "c"], **fields))
    with torch.no_grad():
        base.get_input_embeddings().weight[base.config.pad_token_id] += 3.0  # it leads in many places
    batch = padded(ROWS)
    inference = pool.eval().attention_weights(**batch)
    assert torch.equal(pool.train().attention_weights(**batch), inference)


def test_a_table_whose_weight_is_parametrized() -> None:
    """By noise of train mode: neither is it read, nor does the look at the table fail."""
    pool = get_peft_model(
        (base := FAMILIES["llama"][1]()), SaptConfig(task_type="CAUSAL_LM", tasks=["a", "b"], init_weights=False)
    )
    batch = padded(ROWS)
    expected = pool.eval().attention_weights(**batch)
    add_parametrization(base)
    assert torch.equal(pool.train().attention_weights(**batch), expected)
    assert torch.equal(pool.eval().attention_weights(**batch), expected)
