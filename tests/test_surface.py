"""PEFT and transformers habits around a pool: targeting, native adapters, heads, evaluation inside training."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_model_status, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    MixtralConfig,
    MixtralForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)

from helpers.tiny import (
    CACHE,
    PAD,
    assert_real_pool,
    build_pool,
    padded,
    tiny_llama,
    tiny_t5,
    token_rows,
    watch_weights,
)
from helpers.training import arguments
from helpers.upstream import transformers_adapters
from helpers.words import collate, rows_of, tokenizer
from helpers.zoo import TASKS, base_of, batch_of, pool_of
from peft_sapt import ArmCallback, SaptConfig
from peft_sapt.errors import SaptError, WeightsError

ROWS = token_rows([5, 9, 3, 12])


def logits(model, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**padded(ROWS), **kwargs).logits


def adapted(settings: dict) -> set[str]:
    model = get_peft_model(tiny_llama(), SaptConfig(task_type="CAUSAL_LM", **settings))
    return {name.removeprefix("base_model.model.model.") for name, m in model.named_modules() if hasattr(m, "sapt_A")}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {f"layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"}),
        ({"target_modules": ["o_proj"]}, {f"layers.{i}.self_attn.o_proj" for i in range(2)}),
        ({"target_modules": r".*\.1\..*\.(up|down)_proj"}, {"layers.1.mlp.up_proj", "layers.1.mlp.down_proj"}),
        ({"layers_to_transform": [1]}, {"layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"}),
        ({"exclude_modules": ["v_proj"]}, {f"layers.{i}.self_attn.q_proj" for i in range(2)}),
        ({"exclude_modules": r".*layers\.0\..*"}, {"layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"}),
    ],
)
def test_targeting(settings, expected) -> None:
    assert adapted(settings) == expected


def test_all_linear_leaves_the_head_alone() -> None:
    found = adapted({"target_modules": "all-linear"})
    assert len(found) == 2 * 7 and not [name for name in found if "lm_head" in name]


@pytest.fixture
def saved(tmp_path):
    """A pool and its base in two folders, and the pool's logits."""
    pool = build_pool("llama", TASKS).eval()
    assert_real_pool(pool.attention_weights(**padded(ROWS)))
    expected = logits(pool)
    pool.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    pool.save_pretrained(tmp_path / "pool")
    pool.unload().save_pretrained(tmp_path / "base")
    return tmp_path, expected


@transformers_adapters
def test_transformers_own_adapters(saved) -> None:
    folder, expected = saved
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    plain = logits(base)
    base.load_adapter(str(folder / "pool"))
    torch.testing.assert_close(logits(base), expected)
    base.disable_adapters()
    torch.testing.assert_close(logits(base), plain)
    base.enable_adapters()
    torch.testing.assert_close(logits(base), expected)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    native = base.generate(**padded(ROWS), **settings)
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "pool").eval()
    assert torch.equal(native, wrapped.generate(**padded(ROWS), **settings))


def test_auto_model_of_an_adapter_folder(saved) -> None:
    folder, expected = saved
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder / "pool").eval()), expected)


@transformers_adapters
def test_what_transformers_saves_opens_as_a_peft_model(tmp_path) -> None:
    base = base_of("Llama")
    base.add_adapter(SaptConfig(task_type="CAUSAL_LM", tasks=["a", "b", "c"], init_weights=False))
    expected = logits(base.eval())
    base.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(base_of("Llama"), tmp_path).eval()
    assert torch.equal(logits(loaded), expected) and loaded.tasks == ["a", "b", "c"]


def test_masked_tokens_of_an_encoder_do_not_end_its_prompt() -> None:
    """Masked language models have no task type of their own: with and without labels the query is the whole row."""
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    base = BertForMaskedLM(BertConfig(**sizes, num_attention_heads=4, pad_token_id=PAD))
    model = get_peft_model(base, SaptConfig(tasks=["a", "b", "c"], init_weights=False)).train()
    batch = padded(token_rows([6, 6]))
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, [0, 3]] = batch["input_ids"][:, [0, 3]]
    model(**batch, labels=labels).loss.backward()
    seen = model.base_model.hooks.memory.seen("default")
    torch.testing.assert_close(torch.cat(seen), model.base_model.pooled_prompts([batch]))


def test_what_cannot_work_on_a_pool_is_refused() -> None:
    model = pool_of("Llama")
    with pytest.raises(SaptError, match="Continuous batching"):
        model.generate_batch([[1, 2, 3]])
    with pytest.raises(SaptError, match="nothing to unmerge"):
        model.unmerge_adapter()
    paged = type("PagedAttentionCache", (), {})()
    with pytest.raises(SaptError, match="Continuous batching"):
        model.get_base_model()(input_ids=torch.tensor([[5, 6]]), cache=paged)
    with pytest.raises(SaptError, match="Continuous batching"):
        model.get_base_model()(torch.tensor([[5, 6]]), None, None, paged)


def test_a_cache_is_marked_by_a_forward_that_returns_a_tuple() -> None:
    model, cache = pool_of("Llama"), DynamicCache()
    step = {"input_ids": torch.full((len(ROWS), 1), 7)}
    with torch.no_grad():
        model(**padded(ROWS), **{CACHE: cache}, return_dict=False)
        found = model(**step, **{CACHE: cache}, return_dict=False)[0]
        other = model(**padded(ROWS), use_cache=True)[CACHE]
        assert torch.equal(found, model(**step, **{CACHE: other}).logits)


def test_injection_without_a_wrapper() -> None:
    base = tiny_llama().eval()
    plain = logits(base)
    model = inject_adapter_in_model(SaptConfig(tasks=TASKS, init_weights=False), base)
    assert model is base and not torch.allclose(logits(model), plain, atol=1e-3)
    assert get_model_status(model).num_adapter_layers == 4 + 3  # router, memory and statistics
    wrapped = get_peft_model(tiny_llama(), SaptConfig(task_type="CAUSAL_LM", tasks=TASKS))
    assert get_model_status(wrapped).peft_types == {"default": "SAPT"}


def test_without_a_task_type_generation_holds_the_weights_of_the_prompt() -> None:
    typed = build_pool("llama", TASKS).eval()
    model = get_peft_model(typed.unload(), SaptConfig(tasks=TASKS, init_weights=False, temperature=0.3)).eval()
    held = model.attention_weights(**padded(ROWS))
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    seen = []
    layer = next(m for m in model.modules() if hasattr(m, "sapt_A"))
    watch_weights([layer], seen)
    cached = model.generate(**padded(ROWS), **settings)
    assert torch.equal(cached, model.generate(**padded(ROWS), **settings, use_cache=False))
    assert len(seen) == 10 and all(torch.allclose(weights, held, atol=1e-6) for weights in seen)


def test_encoders_take_stored_rows() -> None:
    from peft_sapt.errors import ReflectionError

    model = pool_of("BERT, sequence", tasks=["a"], task_ranks=[2])
    batches = [{**batch_of("BERT, sequence"), "labels": torch.zeros(4).long()}]
    arm = ArmCallback(tokenizer(), replay="generated")
    with pytest.raises(ReflectionError, match="replay='statistics'"):
        arm.prepare(model, batches)
    arm = ArmCallback(tokenizer(), replay="rows")
    arm.prepare(model, batches)
    arm.reflect(model)
    assert model.committed_tasks == ["a"] and model.peft_config["default"].replay_rows == [4]


def test_two_pools_cannot_be_active_at_once() -> None:
    model = build_pool("llama", TASKS)
    model.add_adapter("other", SaptConfig(task_type="CAUSAL_LM"))
    with pytest.raises(SaptError, match="One pool can be active"):
        model.base_model.set_adapter(["default", "other"])


def test_replicas_of_data_parallel_are_refused() -> None:
    model = build_pool("llama", TASKS)
    model.get_base_model()._is_replica = True
    with pytest.raises(SaptError, match="torchrun"):
        logits(model)


class Flattening(nn.Module):
    """What an MoE block does before its router: tokens of all rows in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(12, 12), nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.gate(x.flatten(0, 1)).view_as(x))


def test_layers_that_flatten_rows_are_refused_by_name() -> None:
    model = get_peft_model(Flattening(), SaptConfig(target_modules=["gate"], token_dim=4, tasks=["a", "b"]))
    x = torch.randn(3, 5, 12)
    with pytest.raises(WeightsError, match=r"gate got 15 rows for 3 prompts.*tokens of all rows.*target_modules"):
        model(x, sapt_weights=torch.eye(2)[[0, 1, 0]])
    one = model(x, sapt_weights=[0.5, 0.5])
    torch.testing.assert_close(one[1:2], model(x[1:2], sapt_weights=[0.5, 0.5]))


@pytest.mark.parametrize("target", ["gate", "experts"])
def test_routers_and_experts_are_refused_by_name_and_the_rest_of_their_model_is_served(target) -> None:
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": PAD}
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(**sizes)).eval()
    with pytest.raises(SaptError, match=rf"layers\.0\.mlp\.{target}.*Take it out of target_modules"):
        get_peft_model(base, SaptConfig(task_type="CAUSAL_LM", target_modules=[target]))
    model = get_peft_model(base, SaptConfig(task_type="CAUSAL_LM", tasks=["a", "b", "c"], init_weights=False)).eval()
    weights = model.attention_weights(**padded(ROWS))
    for i, row in enumerate(ROWS):
        with torch.no_grad():
            alone = model(**padded([row])).logits[0]
        torch.testing.assert_close(logits(model)[i, -len(row) :], alone, atol=1e-4, rtol=1e-3)
    assert weights.shape == (len(ROWS), 3)


def test_layers_that_are_no_linears_are_refused_by_name() -> None:
    with pytest.raises(SaptError, match=r"model\.embed_tokens.*Embedding"):
        get_peft_model(tiny_llama(), SaptConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"]))


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    config = SaptConfig(tasks=["a", "b"], task_ranks=[4, 9], task_alphas=[8, 6], use_rslora=True)
    assert config.scalings == [4.0, 2.0]


def test_evaluation_and_prediction_inside_training(tmp_path) -> None:
    model = build_pool("llama", ["a"])
    args = arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2)
    trainer = Trainer(
        model=model, args=args, train_dataset=rows_of("a"), eval_dataset=rows_of("a", 8, seed=1),
        data_collator=collate, callbacks=[ArmCallback(tokenizer(), replay="rows")],
    )  # fmt: skip
    trainer.train()
    losses = [h["eval_loss"] for h in trainer.state.log_history if "eval_loss" in h]
    assert len(losses) == 2 and model.committed_tasks == ["a"]
    predicted = trainer.predict(rows_of("a", 8, seed=1)).predictions
    with torch.no_grad():
        expected = model.eval()(**{k: v for k, v in collate(rows_of("a", 8, seed=1)).items() if k != "labels"})
    torch.testing.assert_close(torch.tensor(predicted), expected.logits, atol=1e-4, rtol=1e-4)


def test_seq2seq_trainer_generates(tmp_path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_t5(), SaptConfig(task_type="SEQ_2_SEQ_LM", task_name="a"))
    rows = [{"input_ids": r["input_ids"][:-1], "labels": [r["input_ids"][-1], 2]} for r in rows_of("a", 24)]

    def collate_t5(picked: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return {**padded([r["input_ids"] for r in picked]), "labels": torch.tensor([r["labels"] for r in picked])}

    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=8, predict_with_generate=True,
        generation_max_length=4, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model=model, args=args, train_dataset=rows, data_collator=collate_t5,
        callbacks=[ArmCallback(tokenizer(), replay="rows")],
    )  # fmt: skip
    trainer.train()
    found = torch.tensor(trainer.predict(rows[:4]).predictions)
    expected = model.generate(**padded([r["input_ids"] for r in rows[:4]]), max_length=4)
    width = expected.shape[1]
    assert torch.equal(found[:, :width], expected) and model.config.pad_token_id == PAD


def test_nothing_of_peft_or_transformers_is_changed() -> None:
    """Importing and using a pool leaves every class and module function of the libraries as it was."""
    import subprocess
    import sys

    script = """
import peft, transformers, peft.tuners.tuners_utils as t, transformers.modeling_utils as m, peft.peft_model as p
def snapshot():
    found = {}
    for module in (peft, t, m, p, peft.utils.save_and_load, peft.mapping):
        for name, value in vars(module).items():
            if isinstance(value, type) and value.__module__.split('.')[0] in ('peft', 'transformers'):
                if value.__name__ != 'PeftType':
                    found |= {(module.__name__, name, k): id(v) for k, v in vars(value).items() if callable(v)}
            elif callable(value):
                found[module.__name__, name] = id(value)
    return found
from transformers import LlamaConfig, LlamaForCausalLM
tiny = LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
base, before = LlamaForCausalLM(tiny), snapshot()
import peft_sapt, torch
model = peft.get_peft_model(base, peft_sapt.SaptConfig(task_type='CAUSAL_LM'))
model.gradient_checkpointing_enable()
ids = torch.tensor([[1, 2, 3, 4]])
model.train()(input_ids=ids, labels=torch.tensor([[-100, -100, 3, 4]])).loss.backward()
model.generate(input_ids=ids, max_new_tokens=2)
assert snapshot() == before, [k for k in before if snapshot().get(k) != before[k]]
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


def test_a_plain_module_with_weights_of_the_caller() -> None:
    model = pool_of("nn.Module")
    x = batch_of("nn.Module")["x"]
    with torch.no_grad():
        for i, task in enumerate(TASKS):
            one_hot = torch.eye(3)[i].expand(4, 3)
            assert torch.equal(model(x, sapt_task=task), model(x, sapt_weights=one_hot))
        base = base_of("nn.Module")(x)
        torch.testing.assert_close(model(x, sapt_weights=torch.zeros(4, 3)), base)
    with pytest.raises(SaptError, match="prompt"):
        model(x)


def test_generating_in_train_mode_is_no_training() -> None:
    model = build_pool("llama", ["a", "b"]).train()
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    found = model.generate(**padded(ROWS), **settings)
    model.generate(**padded(ROWS), sapt_task="a", **settings)
    assert not model.base_model.hooks.memory.seen("default")
    assert torch.equal(found, model.eval().generate(**padded(ROWS), **settings))


def test_untyped_generation_holds_the_weights_whatever_its_arguments() -> None:
    base = build_pool("llama", TASKS).unload()
    model = get_peft_model(base, SaptConfig(tasks=TASKS, init_weights=False, temperature=0.3)).eval()
    base.generation_config.max_new_tokens = 4
    held, seen = model.attention_weights(**padded(ROWS)), []
    layer = next(m for m in model.modules() if hasattr(m, "sapt_A"))
    watch_weights([layer], seen)
    model.generate(**padded(ROWS), use_cache=False, num_return_sequences=1)
    assert len(seen) > 1 and all(torch.allclose(weights, held, atol=1e-6) for weights in seen)
    labels = torch.full_like(padded(ROWS)["input_ids"], -100)
    labels[:, -1] = 5
    seen.clear()
    model(**padded(ROWS), labels=labels)  # the answer must not enter the query of an evaluation
    prompts = model.attention_weights(**padded(ROWS), labels=labels)
    assert not torch.allclose(prompts, held, atol=1e-3)
    torch.testing.assert_close(seen[0], prompts, atol=1e-6, rtol=0)
    out = model(**padded(ROWS))  # a forward in eval mode still has its gradient
    out.logits.sum().backward()
    assert model.base_model.attention.sapt_key["default"].weight.grad.any()


def test_rows_seen_leave_with_their_pool() -> None:
    model = build_pool("llama", TASKS)
    model.add_adapter("other", SaptConfig(task_type="CAUSAL_LM"))
    model.set_adapter("other")
    labels = padded(ROWS)["input_ids"].clone()
    labels[:, :-1] = -100
    model.train()(**padded(ROWS), labels=labels)
    assert model.base_model.hooks.memory.seen("other")
    model.set_adapter("default")
    model.delete_adapter("other")
    assert not model.base_model.hooks.memory.seen("other")
