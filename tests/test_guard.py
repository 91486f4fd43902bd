"""Training stops before NaN reaches the weights; spent memory halves a batch; checkpoints are whole."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from test_arm import arguments, collate, fresh_pool, prompts_of, rows_of, tokenizer, trainer
from test_generator import FAST
from transformers import Trainer

from peft_sapt import ArmCallback, accept, create_optimizer, last_complete_checkpoint
from peft_sapt.errors import CheckpointError, PickleError, ReflectionError, TrainingError, TruncatedFileError
from peft_sapt.reflection.checkpoints import MARKER, fault_of

NAN, INF = float("nan"), float("inf")


def blocks(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Poisoned(Trainer):
    """Spoils the loss of the micro-batch whose number is given."""

    def __init__(self, *args, at: int, value: float, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.at, self.value, self.seen = at, value, 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.seen += 1
        handle = None
        if self.seen == self.at:  # within the model, so that its output carries it
            handle = model.register_forward_hook(self.spoil, prepend=True)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if handle is not None:
            handle.remove()
        return loss

    def spoil(self, module, args, output):
        output.loss = output.loss * self.value
        return output


def poisoned(model, folder, at: int, value: float, **settings) -> Poisoned:
    args = arguments(folder, **settings)
    return Poisoned(
        model=model, args=args, train_dataset=rows_of("a", 72), data_collator=collate, at=at, value=value,
        callbacks=[ArmCallback(tokenizer(), replay="rows")],
        optimizers=create_optimizer(model, args, attention_lr=1e-3),
    )  # fmt: skip


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_bad_loss_is_named_before_its_step(tmp_path, value: float, accumulation: int) -> None:
    model, at = fresh_pool(), 2 * accumulation + 1  # the first micro-batch of the third step
    run = poisoned(model, tmp_path, at, value, gradient_accumulation_steps=accumulation, max_steps=5)
    expected = fresh_pool()
    control = poisoned(expected, tmp_path, 10_000, value, gradient_accumulation_steps=accumulation, max_steps=5)
    kept = {}
    control.add_callback(keep_after(2, kept, expected))
    control.train()
    with pytest.raises(TrainingError) as caught:
        run.train()
    message = str(caught.value)
    assert "Task 'a', step 3" in message and "weights are those of step 2" in message
    assert f"micro-batch 1 of {accumulation}" in message and len(re.findall(r"\n  w\d+", message)) == 4
    after = blocks(model)
    assert all(torch.equal(after[name], kept[name]) for name in kept), "the step was taken, or undone too far"
    assert all(bool(p.isfinite().all()) for p in model.parameters()) and not model._forward_hooks


def keep_after(step: int, into: dict, model):
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                into.update(blocks(model))

    return Keep()


def test_a_bad_gradient_is_named(tmp_path) -> None:
    model = fresh_pool()
    name, parameter = next((n, p) for n, p in model.named_parameters() if ".sapt_A." in n)
    parameter.register_hook(lambda grad: grad * NAN)
    with pytest.raises(TrainingError, match=rf"step 1: the gradient of '{re.escape(name)}'"):
        trainer(model, tmp_path, "a", [ArmCallback(tokenizer(), replay="rows")]).train()


def test_a_bad_weight_is_named_and_never_committed(tmp_path) -> None:
    model = fresh_pool()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if ".sapt_A." in n)[0, 0] = INF
    with pytest.raises(TrainingError, match=r"the weight '.*sapt_A"):
        trainer(model, tmp_path, "a", [ArmCallback(tokenizer(), replay="rows")]).train()
    with pytest.raises(TrainingError, match="not committed"):
        model.commit_task(inputs=[prompts_of("a", seed=1)])
    assert model.committed_tasks == []


def test_the_guard_leaves_nothing_behind(tmp_path) -> None:
    model, arm = fresh_pool(), ArmCallback(tokenizer(), replay="rows")
    trainer(model, tmp_path, "a", [arm]).train()
    assert arm.guard.handle is None and not arm.guard.seen and not model._forward_hooks


# --- memory ----------------------------------------------------------------------------------------------------------


def raising(error: Exception):
    def generate(**_):
        raise error

    return generate


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory")])
def test_drawing_goes_on_with_smaller_batches(tmp_path, monkeypatch, error) -> None:
    model, sizes = fresh_pool(), []
    generate = model.base_model.generate

    def limited(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 4:
            raise error
        return generate(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "generate", limited)
    arm = ArmCallback(tokenizer(), generator=FAST)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(model, tmp_path, "a", [arm]).train()
    assert model.committed_tasks == ["a"] and arm.reports["a"]["kept"] == 20
    assert sizes[:2] == [FAST.draw_batch_size, FAST.draw_batch_size // 2] and set(sizes[-1:]) == {4}
    assert any("Out of memory while drawing" in str(w.message) for w in caught)


def test_not_one_row_fits(tmp_path, monkeypatch) -> None:
    model = fresh_pool()
    monkeypatch.setattr(model.base_model, "generate", raising(torch.OutOfMemoryError("full")))
    with warnings.catch_warnings(), pytest.raises(ReflectionError, match="Not even one row"):
        warnings.simplefilter("ignore")
        trainer(model, tmp_path, "a", [ArmCallback(tokenizer(), generator=FAST)]).train()
    assert model.committed_tasks == [] and model.tasks == ["a"]


def test_other_errors_of_generation_are_not_swallowed(tmp_path, monkeypatch) -> None:
    model = fresh_pool()
    monkeypatch.setattr(model.base_model, "generate", raising(RuntimeError("odd shape")))
    with pytest.raises(RuntimeError, match="odd shape"):
        trainer(model, tmp_path, "a", [ArmCallback(tokenizer(), generator=FAST)]).train()


# --- checkpoints -----------------------------------------------------------------------------------------------------


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
