"""One callback for several models: texts, reports and generators belong to their pool, and are found in no other."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from peft import PeftModel
from transformers import Trainer

from helpers.training import FAST, arguments, fresh_pool, trainer
from helpers.words import collate, rows_of, tokenizer
from peft_sapt import ArmCallback, SaptConfig, save_pool
from peft_sapt.errors import ReflectionError


def texts_in(folder) -> dict[str, list[str]]:
    files = sorted((folder / "replay").glob("*.jsonl")) if (folder / "replay").is_dir() else []
    return {path.stem: [json.loads(line)["text"] for line in path.read_text().splitlines()] for path in files}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two pools whose first task has one name, trained in turns under one callback on rows of different tasks."""
    folder = tmp_path_factory.mktemp("two")
    arm = ArmCallback(
        tokenizer(), replay="generated", generator=FAST, generator_folder=folder / "generators", min_pseudo_samples=4
    )
    models, told = [fresh_pool(), fresh_pool()], []
    for model, rows in zip(models, ("a", "b"), strict=True):
        trainer(model, folder, rows, [arm]).train()
        told.append((dict(arm.reports), dict(arm.pseudo_samples)))
    return folder, arm, models, told


def test_texts_go_with_their_pool_alone(two, tmp_path) -> None:
    _, arm, models, told = two
    assert told[0][1]["a"] != told[1][1]["a"]
    for i, model in enumerate(models):
        save_pool(model, tmp_path / str(i), arm)
        assert texts_in(tmp_path / str(i)) == told[i][1]
        arm.save_replay(tmp_path / str(i))  # whichever pool the callback worked on last
        assert texts_in(tmp_path / str(i)) == told[i][1]


def test_copies_and_reloads_have_the_texts_of_their_rows(two, tmp_path) -> None:
    _, arm, models, told = two
    save_pool(copy.deepcopy(models[0]), tmp_path / "copy", arm)
    models[1].save_pretrained(tmp_path / "plain")
    loaded = PeftModel.from_pretrained(copy.deepcopy(models[1]).unload(), tmp_path / "plain")
    save_pool(loaded, tmp_path / "loaded", arm)
    assert texts_in(tmp_path / "copy") == told[0][1] and texts_in(tmp_path / "loaded") == told[1][1]


def test_reports_are_those_of_the_pool_that_was_worked_on_last(two) -> None:
    _, arm, models, told = two
    for i in (0, 1, 0):
        assert arm.ledger.of(models[i].base_model.pool).reports == told[i][0]
        assert arm.reports == told[i][0] and arm.pseudo_samples == told[i][1]
    assert arm.ledger.of(copy.deepcopy(models[1]).base_model.pool).texts == told[1][1]
    assert not arm.ledger.of(fresh_pool().base_model.pool).texts


def test_another_pools_texts_are_taken_out_of_a_folder(two, tmp_path) -> None:
    """A pool saved over another one of the same task names does not keep what the other one left."""
    _, arm, models, told = two
    save_pool(models[0], tmp_path, arm)
    (tmp_path / "replay" / "notes.jsonl").write_text("my own\n")
    save_pool(models[1], tmp_path)
    assert not (tmp_path / "replay" / "a.jsonl").exists() and (tmp_path / "replay" / "notes.jsonl").exists()
    save_pool(models[1], tmp_path, arm)
    assert json.loads((tmp_path / "replay" / "a.jsonl").read_text().splitlines()[0])["text"] == told[1][1]["a"][0]
    save_pool(models[1], tmp_path)  # the same pool, without the callback: its texts stay
    assert (tmp_path / "replay" / "a.jsonl").exists()


def test_texts_left_under_a_pool_that_was_written_over(two, tmp_path) -> None:
    """save_pretrained writes in place and knows nothing of texts; the next save_pool sees whose they are."""
    _, arm, models, _ = two
    save_pool(models[0], tmp_path, arm)
    models[1].save_pretrained(tmp_path)
    save_pool(models[1], tmp_path)
    assert texts_in(tmp_path) == {}


def test_a_generator_of_another_pool_is_not_drawn_from(two) -> None:
    """Both wrote to one folder, so that the second one's is there now."""
    _, arm, models, told = two
    before = models[0].base_model.hooks.memory.replay("default")[0].clone()
    with pytest.raises(ReflectionError, match=r"not that of task 'a' of this pool.*generator_folder of its own"):
        arm.redraw(models[0], "a")
    assert torch.equal(models[0].base_model.hooks.memory.replay("default")[0], before)
    arm.redraw(models[1], "a", seed=5)
    assert arm.pseudo_samples["a"] != told[1][1]["a"]
    told[1][1]["a"] = arm.pseudo_samples["a"]
    told[1][0]["a"] = arm.reports["a"]


@pytest.mark.parametrize("what", ["reflect", "penalty"])
def test_prompts_of_one_model_are_not_used_for_another(what: str) -> None:
    arm, models = ArmCallback(tokenizer(), replay="rows", align_steps=2), [fresh_pool(), fresh_pool()]
    batches = [collate(rows_of(task)[:8]) for task in ("a", "b")]
    for model, batch in zip(models, batches, strict=True):
        arm.prepare(model, [batch])
    with pytest.raises(ReflectionError, match=rf"{what}\(\) was called for task 'a'.*another model or a copy"):
        getattr(arm, what)(models[0])
    models[1].commit_task([batches[1]])
    models[1].add_task("next")
    with pytest.raises(ReflectionError, match=r"called for task 'next', but the prompts at hand are of 'a'"):
        getattr(arm, what)(models[1])
    arm.prepare(models[0], [batches[0]])
    arm.reflect(models[0])
    assert models[0].committed_tasks == ["a"]
    expected = models[0].pooled_prompts([batches[0]])
    replay = models[0].base_model.hooks.memory.replay("default")[0]
    assert all(bool((expected == row).all(dim=1).any()) for row in replay)


def test_a_trainer_copied_with_its_callback_goes_on(tmp_path) -> None:
    model, arm = fresh_pool(), ArmCallback(tokenizer(), replay="rows", align_steps=2)
    run = Trainer(model, arguments(tmp_path), train_dataset=rows_of("a"), data_collator=collate, callbacks=[arm])
    twin = copy.deepcopy(run)
    for each in (twin, run):
        each.train()
        assert each.model.committed_tasks == ["a"]
    assert twin.model is not run.model


def test_ridge_reports_and_no_texts(tmp_path) -> None:
    arm, models = (
        ArmCallback(tokenizer(), replay="generated"),
        [fresh_pool(router="ridge"), fresh_pool(router="ridge")],
    )
    for model, rows in zip(models, ("a", "b"), strict=True):
        trainer(model, tmp_path, rows, [arm]).train()
        save_pool(model, tmp_path / rows, arm)
        assert texts_in(tmp_path / rows) == {} and set(arm.reports) == {"a"}


def test_texts_beside_a_named_adapter_are_its_own(tmp_path) -> None:
    """PEFT saves it into a folder of its name."""
    arm = ArmCallback(tokenizer(), replay="generated", generator=FAST, min_pseudo_samples=4)
    models, texts = [], []
    for rows in ("a", "b"):
        torch.manual_seed(0)
        model = fresh_pool()
        model.add_adapter("mine", SaptConfig(task_type="CAUSAL_LM", task_name="a"))
        model.set_adapter("mine")
        trainer(model, tmp_path / "runs", rows, [arm]).train()
        models.append(model)
        texts.append(dict(arm.pseudo_samples))
    models[0].save_pretrained(tmp_path / "pool", selected_adapters=["mine"])
    arm.save_replay(tmp_path / "pool")
    assert texts_in(tmp_path / "pool") == texts[0] != texts[1]


def test_a_callback_can_be_pickled(two) -> None:
    _, arm, models, told = two
    twin = pickle.loads(pickle.dumps(arm))
    assert twin.ledger.of(models[0].base_model.pool).texts == told[0][1]
