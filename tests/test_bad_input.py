"""Bad input raises an error that names the field or task and the cure, and changes nothing."""

from __future__ import annotations

import types

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import NoMatchingPeftModuleError

from helpers.tiny import CACHE, build_pool, padded, tiny_llama, token_rows
from peft_sapt import ArmCallback, SaptConfig
from peft_sapt.errors import PoolFormatError, PromptError, ReflectionError, SaptError, TaskError, WeightsError
from peft_sapt.routing.mixture import Mixture

ROWS = token_rows([5, 9, 3])
BAD_NAMES = ["", "  ", "a/b", "a.b", "a\\b", "123", "new\nline", " a", "x" * 129, None, 7]


@pytest.fixture
def model():
    return build_pool("llama", ["a", "b", "c"])


def snapshot(model) -> tuple[list[str], dict[str, torch.Tensor], list[str]]:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return model.tasks, state, [n for n, p in model.named_parameters() if p.requires_grad]


def assert_unchanged(model, before) -> None:
    tasks, state, trainable = before
    assert model.tasks == tasks
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[k], v) for k, v in state.items())


@pytest.mark.parametrize("name", BAD_NAMES)
def test_malformed_names(model, name) -> None:
    before = snapshot(model)
    with pytest.raises(TaskError, match=r"(?i)task name.*Use a short text"):
        model.add_task(name)
    assert_unchanged(model, before)
    if name is not None:
        with pytest.raises(TaskError):
            SaptConfig(task_name=name)
    with pytest.raises(TaskError):
        SaptConfig(tasks=["ok", name])


def test_duplicate_and_unknown_names(model) -> None:
    before = snapshot(model)
    with pytest.raises(TaskError, match=r"'b' is already in the pool.*choose another name"):
        model.add_task("b")
    with pytest.raises(TaskError, match=r"no task 'zzz'.*\['a', 'b', 'c'\]"):
        model.remove_task("zzz")
    batch = padded(ROWS)
    with pytest.raises(TaskError, match=r"zzz.*\['a', 'b', 'c'\]"):
        model.eval()(**batch, sapt_task="zzz")
    with pytest.raises(TaskError, match="zzz"):
        model.generate(**batch, sapt_task="zzz", max_new_tokens=2)
    with pytest.raises(TaskError, match="holds a name twice"):
        SaptConfig(tasks=["a", "a"])
    with pytest.raises(TaskError, match="task_name is 'x'"):
        SaptConfig(tasks=["a", "b"], task_name="x")
    model.train()
    assert_unchanged(model, before)


def test_the_only_task_cannot_be_removed() -> None:
    model = build_pool("llama", ["a"])
    before = snapshot(model)
    with pytest.raises(TaskError, match=r"'a' is the only task.*delete_adapter"):
        model.remove_task("a")
    assert_unchanged(model, before)


@pytest.mark.parametrize("rank", [0, -1, 2.5])
def test_a_bad_rank_adds_nothing(model, rank) -> None:
    before = snapshot(model)
    with pytest.raises(SaptError, match="task_ranks"):
        model.add_task("d", r=rank)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0), ("r", 1.5), ("lora_alpha", 0), ("lora_alpha", float("nan")), ("lora_dropout", 1.0),
        ("block", "adapter"), ("router", "magic"), ("query_dim", 0), ("query_activation", "before"),
        ("temperature", 0.0), ("task_ranks", [4, 4]), ("replay_rows", [-1]), ("tasks", []), ("tasks", "ab"),
        ("layers_pattern", "layers"),
    ],
)  # fmt: skip
def test_config_fields_out_of_range_are_named(field: str, value) -> None:
    with pytest.raises(SaptError, match=field):
        SaptConfig(**{field: value})


def test_training_on_a_task_that_is_not_the_current_one(model) -> None:
    batch = padded(ROWS)
    before = snapshot(model)
    with pytest.raises(TaskError, match=r"Training on task \['a'\].*current task 'c'"):
        model.train()(**batch, labels=batch["input_ids"], sapt_task="a")
    assert_unchanged(model, before)
    model(**batch, sapt_task="c")
    with torch.no_grad():
        model(**batch, sapt_task="a")


def test_target_modules_that_match_nothing() -> None:
    base = tiny_llama()
    before = set(base.state_dict())
    with pytest.raises(NoMatchingPeftModuleError, match=r"nothing_here.*not found in the base model.*check"):
        get_peft_model(base, SaptConfig(task_type="CAUSAL_LM", target_modules=["nothing_here"]))
    assert set(base.state_dict()) == before
    assert not hasattr(base, "shared_attention")
    with pytest.raises(SaptError, match=r"norm.*Take it out of target_modules"):
        get_peft_model(tiny_llama(), SaptConfig(task_type="CAUSAL_LM", target_modules=["norm"]))


def test_a_base_model_of_another_width(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    base = tiny_llama(hidden=32)
    before = set(base.state_dict())
    with pytest.raises(PoolFormatError, match=r"token_dim is 64.*width 32.*another base model"):
        PeftModel.from_pretrained(base, tmp_path)
    assert set(base.state_dict()) == before


def test_empty_prompts(family: str) -> None:
    model = build_pool(family, ["a", "b"]).eval()
    empty = torch.zeros(2, 0, dtype=torch.long)
    with pytest.raises(PromptError, match="prompt is empty"):
        model.attention_weights(empty)
    with pytest.raises(PromptError, match=r"(?i)input_ids"):
        model.attention_weights()
    with pytest.raises(PromptError, match="prompt is empty"):
        model.generate(input_ids=empty, max_new_tokens=2)


def test_an_all_padding_row_in_training(model) -> None:
    batch = padded(ROWS)
    batch["attention_mask"][1] = 0
    labels = torch.full_like(batch["input_ids"], -100)
    labels[[0, 2], -1] = 5
    with pytest.raises(PromptError, match=r"Rows \[1\] have no prompt token.*Drop them"):
        model.train()(**batch, labels=labels)


def test_labels_without_a_prompt(model) -> None:
    batch = padded(ROWS)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with pytest.raises(PromptError, match=r"Rows \[0, 1, 2\] have labels but no prompt token.*-100"):
        model.train()(**batch, labels=labels)


def test_training_without_labels_in_the_call_warns_once(model) -> None:
    batch = padded(ROWS)
    with pytest.warns(UserWarning, match="sapt_prompt_mask"):
        model.train()(**batch)


def test_a_tokenizer_without_a_pad_token() -> None:
    tokenizer = types.SimpleNamespace(pad_token_id=None, eos_token_id=2)
    with pytest.raises(ReflectionError, match=r"pad token.*tokenizer\.pad_token = "):
        ArmCallback(tokenizer)


@pytest.mark.parametrize("settings", [{"replay": "magic"}, {"new_task_floor": 1.0}, {"new_task_floor": 0.0}])
def test_callback_settings_out_of_range(settings) -> None:
    tokenizer = types.SimpleNamespace(pad_token_id=1, eos_token_id=2)
    with pytest.raises(ReflectionError, match=next(iter(settings))):
        ArmCallback(tokenizer, **settings)


def test_weights_that_do_not_fit(model) -> None:
    batch = padded(ROWS)
    model.eval()
    with pytest.raises(WeightsError, match=r"shape \[3, 2\].*\[3, 3\].*model\.tasks"):
        model(**batch, sapt_weights=torch.ones(3, 2))
    with pytest.raises(WeightsError, match="NaN"):
        model(**batch, sapt_weights=torch.full((3, 3), float("nan")))
    with pytest.raises(WeightsError, match="both given"):
        model(**batch, sapt_weights=torch.ones(3, 3), sapt_task="a")
    with pytest.raises(WeightsError, match="2 names for 3 rows"):
        model(**batch, sapt_task=["a", "b"])
    with pytest.raises(PromptError, match=r"sapt_prompt_mask has shape"):
        model(**batch, sapt_prompt_mask=torch.ones(3, 2))
    with pytest.raises(PromptError, match=r"dimensions.*sapt_prompt_mask"):
        model.attention_weights(batch["input_ids"], torch.ones(3, 1, 9, 9))


def test_a_cache_of_another_pool(model) -> None:
    ids = torch.tensor(token_rows([4, 4]))
    model.eval()
    with torch.no_grad():
        with model.disable_adapter():
            cache = model(input_ids=ids, use_cache=True)[CACHE]
        with pytest.raises(WeightsError, match=rf"{CACHE}.*no attention weights"):
            model(input_ids=ids[:, :1], **{CACHE: cache})


def test_a_layer_called_alone_or_rerun_by_foreign_checkpointing(model) -> None:
    layer = next(m for m in model.modules() if hasattr(m, "sapt_A"))
    with pytest.raises(WeightsError, match="outside of the model's own forward"):
        layer(torch.randn(2, 3, 64))
    with pytest.raises(WeightsError, match="rows"):
        model.base_model.hooks.state.use(Mixture("default", torch.eye(3), model.peft_config["default"]))
        layer(torch.randn(2, 3, 64))
    model.base_model.hooks.state.clear()
    segment = model.base_model.model.model.layers[0]
    inner = segment.forward  # activation checkpointing that bypasses transformers: the layer is rerun alone
    segment.forward = lambda *a, **k: torch.utils.checkpoint.checkpoint(inner, *a, **k, use_reentrant=False)
    batch = padded(ROWS)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = 5
    with pytest.raises(WeightsError, match="gradient_checkpointing_enable"):
        model.train()(**batch, labels=labels).loss.backward()


def test_names_peft_would_confuse(model) -> None:
    with pytest.raises(SaptError, match="all digits"):
        model.add_adapter("0", SaptConfig(task_type="CAUSAL_LM"))
    with pytest.raises(SaptError, match=r"adapter_names.*sapt_task"):
        model(**padded(ROWS), adapter_names=["default"] * 3)
