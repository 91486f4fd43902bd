"""A query that holds an answer, or padding, is told where it can be told; once."""

from __future__ import annotations

import shelve
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import BatchEncoding, Trainer

from helpers.tiny import PAD, build_pool, padded, token_rows
from helpers.training import arguments
from helpers.words import collate, rows_of
from peft_sapt import PromptMaskCollator
from peft_sapt.routing.notices import padding_token

TASKS = ["a", "b", "c"]
ROWS = rows_of("a")[:8]


def told(call: Callable[[], Any]) -> list[str]:
    """What is said of queries while ``call`` runs, with every filter open."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in found if "sapt_" in str(w.message)]


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **more):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


def evaluation(kind: str, model, folder, collator=collate) -> Trainer:
    """A Trainer that keeps the labels from the model in an evaluation."""
    settings = {"label_smoothing_factor": 0.1} if kind == "smoothing" else {}
    settings["remove_unused_columns"] = False
    loss = (
        {"compute_loss_func": lambda outputs, labels, **more: outputs.logits.float().mean()} if kind == "func" else {}
    )
    made = OwnLoss if kind == "own" else Trainer
    return made(model, arguments(folder, **settings), eval_dataset=ROWS, data_collator=collator, **loss)


@pytest.mark.parametrize("router", ["attention", "ridge"])
@pytest.mark.parametrize("kind", ["smoothing", "func", "own"])
def test_an_evaluation_that_keeps_the_labels_is_told_once(kind: str, router: str, tmp_path) -> None:
    model = build_pool("llama", TASKS, router=router).eval()
    run = evaluation(kind, model, tmp_path)
    found = told(lambda: (run.evaluate(), run.evaluate()))
    assert len(found) == 1 and found[0].startswith("Evaluation without labels in the model call"), found
    assert "PromptMaskCollator" in found[0]


@pytest.mark.parametrize("kind", ["smoothing", "func", "own"])
def test_with_a_prompt_mask_nothing_is_said_and_no_answer_is_read(kind: str, tmp_path) -> None:
    model = build_pool("llama", TASKS).eval()
    queries = []
    attend = model.base_model.router.attend
    model.base_model.router.attend = lambda name, pooled, *more: (queries.append(pooled), attend(name, pooled, *more))[
        1
    ]
    run = evaluation(kind, model, tmp_path, PromptMaskCollator(collate))
    assert told(run.evaluate) == []
    expected = model.pooled_prompts([padded([row["input_ids"][:-1] for row in ROWS])])
    torch.testing.assert_close(torch.cat(queries), expected)


def test_the_usual_evaluation_and_its_like_are_silent(tmp_path) -> None:
    model = build_pool("llama", TASKS).eval()
    prompts_alone, labels = padded([row["input_ids"][:-1] for row in ROWS]), torch.full((8, 3), 7)

    def prompts() -> None:
        model(**prompts_alone)
        assert labels.shape  # of something else

    assert told(evaluation("usual", model, tmp_path).evaluate) == []
    with torch.no_grad():
        assert told(prompts) == []
        assert told(lambda: model.generate(**padded(token_rows([4, 7])), max_new_tokens=2)) == []


def test_a_loop_of_ones_own() -> None:
    """Labels in a variable of that name, or left in the batch."""

    def popped(model) -> None:
        batch = collate(ROWS)
        labels = batch.pop("labels")
        model(**batch)
        assert labels.shape

    def kept(model) -> None:
        batch = BatchEncoding(collate(ROWS))
        model(batch["input_ids"], attention_mask=batch["attention_mask"])

    for loop in (popped, kept):
        model = build_pool("llama", TASKS).eval()
        with torch.no_grad():
            assert len(told(lambda loop=loop, model=model: (loop(model), loop(model)))) == 1


def test_training_without_labels_is_told_once_too() -> None:
    model, batch = build_pool("llama", TASKS).train(), collate(ROWS)
    del batch["labels"]
    found = told(lambda: [model(**batch) for _ in range(3)])
    assert len(found) == 1 and found[0].startswith("Training without labels")


@pytest.mark.parametrize("pad", [0, 2, 7])
def test_right_padded_scoring_without_a_mask(pad: int) -> None:
    """As harnesses score answers: with zeros, with the end token, with any token."""
    model = build_pool("llama", TASKS).eval()
    model.config.pad_token_id = model.config.eos_token_id
    rows = token_rows([5, 8, 11], seed=2)
    ids = torch.tensor([row + [pad] * (11 - len(row)) for row in rows])
    with torch.no_grad():
        found = told(lambda: (model(ids), model(ids)))
        assert len(found) == 1 and f"run of token {pad}" in found[0] and "attention_mask=[B, S]" in found[0]
        fresh = build_pool("llama", TASKS).eval()
        mask = torch.tensor([[1] * len(row) + [0] * (11 - len(row)) for row in rows])
        assert told(lambda: fresh(ids, attention_mask=mask)) == []


def test_what_looks_like_padding() -> None:
    def token(*rows: list[int]) -> int | None:
        return padding_token(torch.tensor(rows), {0})

    assert token([5, 6, 0, 0], [5, 6, 7, 8]) == 0
    assert token([5, 6, 7, 0], [5, 6, 7, 8]) is None, "one such token may be a word"
    assert token([5, 6, 0, 0]) is None, "alone there is nothing to depend on"
    assert token([5, 6, 0, 0], [5, 7, 0, 0]) is None, "all rows end so"
    assert token([5, 6, 0, 0], [5, 6, 9, 9], [5, 6, 7, 8]) is None, "two tokens"
    assert token([5, 6, 0, 0], [5, 6, 8, 0], [5, 6, 7, 8]) is None, "it ends a row of full length"
    assert token([5, 6, 7, 8, 8], [9, 10, 11, 12, 13]) is None, "a word may be doubled"
    assert token([5, 8, 8, 8, 8], [9, 10, 11, 12, 13]) == 8
    model = build_pool("llama", TASKS).eval()
    ids = torch.tensor([row + [PAD] * (8 - len(row)) for row in token_rows([5, 8])])
    with torch.no_grad():
        assert told(lambda: model(ids)) == [], "the model's own pad token is no prompt anyway"


def test_nothing_that_a_caller_deletes_is_kept_alive() -> None:
    """The look at callers' variables must not hold what they were."""
    model = build_pool("llama", TASKS).eval()

    def evaluate() -> bool:
        batch, large = collate(ROWS), torch.empty(1000)
        alive = weakref.ref(large)
        with torch.no_grad():
            model(batch["input_ids"], batch["attention_mask"])
        del large
        return alive() is not None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not evaluate()


def test_whatever_callers_have_is_left_in_peace(tmp_path) -> None:
    model = build_pool("llama", TASKS).eval()

    class Lazy(dict):
        def get(self, *args):
            raise RuntimeError("loads everything")

    def call() -> None:
        data = Lazy()
        with shelve.open(str(tmp_path / "x")) as inputs:
            pass
        batch = Lazy(labels="none")
        with torch.no_grad():
            model(torch.tensor(token_rows([5])))
        assert inputs is not data is not batch

    assert told(call) == []


@pytest.mark.parametrize("kept", [True, False])
def test_a_loop_that_keeps_its_labels_in_a_container(kept: bool) -> None:
    model, inputs = build_pool("llama", TASKS).eval(), BatchEncoding(collate(ROWS))
    if not kept:
        del inputs["labels"]
    with torch.no_grad():
        assert len(told(lambda: evaluated(model, inputs))) == kept


def evaluated(model, inputs) -> None:
    model(inputs["input_ids"], attention_mask=inputs["attention_mask"])
