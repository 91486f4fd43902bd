"""Prompts of no task, in the forms in which they come, and a task's own prompts rendered once more."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from helpers.training import fresh_pool, prompts_of, rows_of, trainer
from helpers.words import collate, tokenizer
from peft_sapt import ArmCallback, SaptConfig
from peft_sapt.arm import everyday
from peft_sapt.errors import ReflectionError

TEMPLATE = (
    "{% for m in messages %}{{ 'w80 w81 ' if m.role == 'system' else 'w82 ' }}{{ m.content }} w83 {% endfor %}w84"
)
DEAF = "{% for m in messages %}{% if m.role == 'user' %}w82 {{ m.content }} w83 {% endif %}{% endfor %}w84"
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "w82 {{ messages[0].content }} w84"
)


def chatty(template: str):
    words = tokenizer()
    words.chat_template = template
    return words


def test_the_prompts_are_many_and_different() -> None:
    texts = everyday.everyday_prompts()
    assert len(texts) >= 300 and len(set(texts)) == len(texts) and all(text.strip() == text for text in texts)


@pytest.mark.parametrize("template, kinds", [(None, 2), (TEMPLATE, 4), (DEAF, 3), (STRICT, 3)])
def test_the_forms_of_a_tokenizer(template: str | None, kinds: int) -> None:
    """Bare, before what all prompts of the task end with, in the template, behind an instruction if it takes one."""
    words = chatty(template) if template else tokenizer()
    prompts = [[10, 11, 70], [12, 70], [13, 14, 15, 70]]
    forms = everyday.forms_of(words, prompts)
    assert len(forms) == kinds and len({kind[0] for kind in forms}) == kinds
    assert any(kind[0].after == (70,) for kind in forms)


def test_what_prompts_end_with() -> None:
    assert everyday.common_end([[1, 2, 3], [4, 2, 3]]) == (2, 3)
    assert everyday.common_end([[1, 2], [1, 2]]) == () == everyday.common_end([]), "one prompt tells of no wrapper"


def test_a_tasks_prompts_in_the_template() -> None:
    words, prompts = chatty(TEMPLATE), [[10, 11], [12], [13]]
    rendered = everyday.renderings_of(words, prompts, "chat")
    form = everyday.chat_form(words)
    assert rendered[0] == [*form.before, 10, 11, *form.after] and rendered[2] == [*form.before, 13, *form.after]
    assert len(rendered[1]) > len(rendered[2]), "every other one stands behind an instruction"
    assert everyday.renderings_of(tokenizer(), prompts, "chat") == []
    assert everyday.renderings_of(chatty(DEAF), prompts, "chat")[1] == [
        *everyday.chat_form(chatty(DEAF)).with_whole([12])
    ]
    assert everyday.renderings_of(words, rendered, "chat") == [], "they are in the template already"
    assert everyday.renderings_of(words, prompts, ["w90 {} w91"])[1] == [
        *everyday.ids_of(words, "w90 "), 12, *everyday.ids_of(words, " w91")]  # fmt: skip


def test_prompts_in_the_template_stay_with_their_task(tmp_path) -> None:
    """Also unseen ones, behind an instruction that was never used; everyday prompts there do not."""
    words, model = chatty(TEMPLATE), fresh_pool()
    arm = ArmCallback(words)
    for name in ("a", "b"):
        if name not in model.tasks:
            model.add_task(name)
        trainer(model, tmp_path, name, [arm], max_steps=3).train()
    form = everyday.chat_form(words, "w85 w86 w87")
    for i, name in enumerate(("a", "b")):
        rows = [form.with_whole(row) for row in prompts_of(name, seed=5)["input_ids"].tolist()]
        weights = model.eval().attention_weights(input_ids=torch.tensor(rows))
        assert float((weights.argmax(dim=1) == i).float().mean()) > 0.8
        assert float((weights.sum(dim=1) == 0).float().mean()) < 0.2


def test_prompts_that_leave_no_room_for_a_template(tmp_path) -> None:
    """Renderings that the model has no positions for are left out."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=16, pad_token_id=1,
                                      bos_token_id=3, eos_token_id=2))  # fmt: skip
    model = get_peft_model(base, SaptConfig(task_type="CAUSAL_LM", task_name="a"))
    rows = [[10 + (i * j) % 50 for j in range(16)] for i in range(1, 9)]
    batch = collate([{"input_ids": row, "labels": [-100] * 14 + row[14:]} for row in rows])
    arm = ArmCallback(chatty(TEMPLATE))
    arm.prepare(model, [batch])
    assert arm.every is not None and len(arm.every) <= 16 and model.base_model.pool.statistics.known("default")[0]


def test_refusals() -> None:
    for templates in ("plain", ["no place"], ["{} twice {}"]):
        with pytest.raises(ReflectionError, match=r"templates=.*'chat' or texts with one"):
            ArmCallback(tokenizer(), templates=templates)
    assert len(rows_of("a")) > 0
