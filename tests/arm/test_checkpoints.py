"""Checkpoints of the Trainer are whole, or they are refused by name."""

from __future__ import annotations

import pytest
from transformers import Trainer

from helpers.training import arguments, fresh_pool, trainer
from helpers.words import collate, rows_of, tokenizer
from peft_sapt import ArmCallback, accept, create_optimizer, last_complete_checkpoint
from peft_sapt.errors import CheckpointError, PickleError, TruncatedFileError
from peft_sapt.storage.checkpoints import MARKER, fault_of


@pytest.fixture
def stopped(tmp_path):
    """A run with checkpoints 2 and 4."""
    trainer(fresh_pool(), tmp_path, "a", [arm()], max_steps=4, save_strategy="steps", save_steps=2).train()
    return tmp_path


def arm() -> ArmCallback:
    return ArmCallback(tokenizer(), replay="rows")


def resumed(folder, checkpoint):
    run = trainer(fresh_pool(), folder, "a", [arm()], max_steps=6, save_strategy="steps", save_steps=2)
    run.train(resume_from_checkpoint=checkpoint)
    return run


def test_a_complete_checkpoint_says_so(stopped) -> None:
    newest = stopped / "checkpoint-4"
    assert fault_of(newest) is None and last_complete_checkpoint(stopped) == str(newest)
    assert resumed(stopped, str(newest)).state.global_step == 6


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / MARKER).unlink(), "was not written to its end"),
        (lambda f: (f / "rng_state.pth").unlink(), r"rng_state.pth is missing"),
        (lambda f: (f / "scheduler.pt").write_bytes((f / "scheduler.pt").read_bytes() + b"x"), r"in place of"),
        (lambda f: (f / MARKER).write_text("{"), "is not JSON"),
        (lambda f: (f / MARKER).write_text("[1]"), "lists no sizes"),
        (lambda f: (f / MARKER).write_bytes(b" " * 2**21), "too large"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(stopped, damage, said: str) -> None:
    newest = stopped / "checkpoint-4"
    damage(newest)
    with pytest.raises(CheckpointError, match=rf"checkpoint-4 is incomplete: .*{said}.*resume from .*checkpoint-2"):
        resumed(stopped, str(newest))
    assert last_complete_checkpoint(stopped) == str(stopped / "checkpoint-2")
    assert resumed(stopped, last_complete_checkpoint(stopped)).state.global_step == 6


def test_it_can_be_accepted_by_name(stopped) -> None:
    (stopped / "checkpoint-4" / MARKER).unlink()
    with accept("unmarked_checkpoint"):
        assert resumed(stopped, str(stopped / "checkpoint-4")).state.global_step == 6


def test_a_marker_cannot_point_outside(tmp_path) -> None:
    (tmp_path / "secret").write_text("four")
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / MARKER).write_text('{"../secret": 4}')
    assert "secret" in fault_of(folder)


def test_without_any_checkpoint_the_trainer_begins_anew(tmp_path) -> None:
    assert last_complete_checkpoint(tmp_path) is None and last_complete_checkpoint(tmp_path / "nowhere") is None


def test_a_checkpoint_elsewhere_is_the_one_that_is_checked(stopped, tmp_path_factory) -> None:
    """Whatever lies in output_dir under the same number."""
    import shutil

    backup, other = tmp_path_factory.mktemp("backup"), tmp_path_factory.mktemp("other")
    shutil.copytree(stopped / "checkpoint-4", backup / "checkpoint-4")
    (other / "checkpoint-4").mkdir()
    assert resumed(other, str(backup / "checkpoint-4")).state.global_step == 6
    (backup / "checkpoint-4" / MARKER).unlink()
    with pytest.raises(CheckpointError, match=rf"{backup.name}/checkpoint-4 is incomplete"):
        resumed(tmp_path_factory.mktemp("third"), str(backup / "checkpoint-4"))


def test_what_a_trainer_loads_is_no_pickle_and_whole(stopped) -> None:
    import shutil

    weights = stopped / "checkpoint-4" / "adapter_model.safetensors"
    shutil.copy(weights, stopped / "kept")
    weights.write_bytes(weights.read_bytes()[:-50])
    with accept("unmarked_checkpoint"), pytest.raises(TruncatedFileError):
        resumed(stopped, str(stopped / "checkpoint-4"))
    weights.rename(stopped / "checkpoint-4" / "adapter_model.bin")
    with accept("unmarked_checkpoint"), pytest.raises(PickleError):
        resumed(stopped, str(stopped / "checkpoint-4"))


def test_a_card_that_changes_does_no_harm(stopped) -> None:
    newest = stopped / "checkpoint-4"
    (newest / "README.md").write_text("other words")
    (newest / "rng_state_1.pth").write_bytes(b"of another process")
    assert fault_of(newest) is None


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path) -> None:
    model = fresh_pool()
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
                     load_best_model_at_end=True, save_total_limit=1)  # fmt: skip
    run = Trainer(
        model=model, args=args, train_dataset=rows_of("a"), eval_dataset=rows_of("a", 8), data_collator=collate,
        callbacks=[arm()], optimizers=create_optimizer(model, args, attention_lr=1e-3),
    )  # fmt: skip
    run.train()
    assert model.committed_tasks == ["a"]


def test_a_trainer_without_the_callback_after_one_with_it(tmp_path) -> None:
    """Its checkpoints have no mark, and need none: the look for marks ends with the Trainer that makes them."""
    model = fresh_pool()
    trainer(model, tmp_path / "one", "a", [arm()], max_steps=2).train()
    model.add_task("b")
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run = Trainer(
        model, arguments(tmp_path / "two", max_steps=2, load_best_model_at_end=True, **best),
        train_dataset=rows_of("b"), eval_dataset=rows_of("b", seed=1)[:8], data_collator=collate,
    )  # fmt: skip
    run.train()
    model.commit_task()
    assert model.committed_tasks == ["a", "b"]
