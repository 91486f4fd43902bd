"""Training stops before NaN reaches the weights; spent memory halves a batch; checkpoints are whole."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from transformers import Trainer

from helpers.training import FAST, arguments, fresh_pool, trainer
from helpers.words import collate, prompts_of, rows_of, tokenizer
from peft_sapt import ArmCallback, create_optimizer
from peft_sapt.errors import ReflectionError, TrainingError

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
    arm = ArmCallback(tokenizer(), replay="generated", generator=FAST)
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
        trainer(model, tmp_path, "a", [ArmCallback(tokenizer(), replay="generated", generator=FAST)]).train()
    assert model.committed_tasks == [] and model.tasks == ["a"]


def test_other_errors_of_generation_are_not_swallowed(tmp_path, monkeypatch) -> None:
    model = fresh_pool()
    monkeypatch.setattr(model.base_model, "generate", raising(RuntimeError("odd shape")))
    with pytest.raises(RuntimeError, match="odd shape"):
        trainer(model, tmp_path, "a", [ArmCallback(tokenizer(), replay="generated", generator=FAST)]).train()
