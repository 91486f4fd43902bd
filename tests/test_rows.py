"""Rows in the shapes that people have become training rows: against a tokenisation by hand, and TRL's."""

from __future__ import annotations

import pytest

from helpers.words import tokenizer
from peft_sapt import training_rows
from peft_sapt.errors import PromptError

TURNS = "{% for m in messages %}{{ m.role }} {{ m.content }} . {% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}assistant {% endif %}"


@pytest.fixture
def words():
    found = tokenizer()
    found.chat_template = TEMPLATE
    return found


def ids(words, text: str) -> list[int]:
    return words(text, add_special_tokens=False).input_ids


def test_texts(words) -> None:
    vocabulary = [word for word, i in sorted(words.get_vocab().items(), key=lambda pair: pair[1]) if i > 3][:5]
    first, second = " ".join(vocabulary[:3]), vocabulary[3]
    [row] = training_rows(words, [{"prompt": first, "completion": " " + second, "source": "ignored"}])
    prompt, answer = words(first).input_ids, ids(words, " " + second)
    if prompt[-1] == words.eos_token_id:
        prompt = prompt[:-1]
    assert row["input_ids"] == [*prompt, *answer, words.eos_token_id]
    assert row["labels"] == [-100] * len(prompt) + [*answer, words.eos_token_id]


def test_a_chat_learns_its_last_answer(words) -> None:
    vocabulary = [word for word, i in sorted(words.get_vocab().items(), key=lambda pair: pair[1]) if i > 3]
    a, b, c, d = vocabulary[:4]
    said = [("user", a), ("assistant", b), ("user", c), ("assistant", d)]
    messages = [{"role": role, "content": text} for role, text in said]
    [row] = training_rows(words, [{"messages": messages}])
    asked = "".join(f"{role} {text} . " for role, text in said[:-1]) + "assistant "
    answer = [*ids(words, f"{d} . "), words.eos_token_id]  # this template writes no end token
    assert row["input_ids"] == [*ids(words, asked), *answer]
    assert row["labels"] == [-100] * len(ids(words, asked)) + answer


def test_token_ids_are_passed_on(words) -> None:
    row = {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "attention_mask": [1, 1, 1]}
    assert training_rows(words, [row]) == [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}]
    assert training_rows(words, []) == []


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "all in one"}, r"Row 1 has the keys \['text'\]: it must be \{'prompt'"),
        ({"prompt": "x", "completion": None}, "Row 1 has the keys"),
        ({"prompt": "x", "completion": "  "}, "Row 1 has no answer"),
        ({"prompt": "", "completion": "y"}, "Row 1 has no prompt"),
        ({"messages": []}, "messages of row 1 do not end with the assistant's"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages of row 1 do not end"),
        ({"messages": '[{"role": "assistant"}]'}, "messages of row 1 do not end"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]}, "do not end"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "Row 1 has no prompt: its only message"),
        ("prompt", "Row 1 is a str: it must be"),
        ({"input_ids": [[1], [2]], "labels": [1, 2]}, "Row 1: input_ids and labels must be lists of numbers"),
        ({"input_ids": [1, 2], "labels": [1]}, "Row 1 has 2 input_ids and 1 labels"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "Row 1 has no answer"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "Row 1 has no prompt"),
    ],
)
def test_a_row_that_is_none_is_named(words, row, said: str) -> None:
    good = {"input_ids": [5, 6], "labels": [-100, 6]}
    with pytest.raises(PromptError, match=said):
        training_rows(words, [good, row])


def test_templates_that_cannot_be_split(words) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    words.chat_template = "{{ messages | length }} {% for m in messages %}{{ m.content }} {% endfor %}"
    with pytest.raises(PromptError, match="otherwise than without it"):
        training_rows(words, [{"messages": messages}])
    words.chat_template = None
    with pytest.raises(PromptError, match="no chat template"):
        training_rows(words, [{"messages": messages}])


def test_what_is_no_list_of_rows(words) -> None:
    for rows in ({"train": [1]}, "prompt"):
        with pytest.raises(PromptError, match="one split of a dataset"):
            training_rows(words, rows)
    words.eos_token = None
    with pytest.raises(PromptError, match="no end token"):
        training_rows(words, [])
