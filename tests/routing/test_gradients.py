"""Checkpointing, packing, label smoothing, accumulation, loss scaling: the gradients of the plain path."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Trainer, TrainerCallback

from helpers.gradients import PROMPT, ROWS, Record, assert_same, batch_of, gradients, gradients_of, packed, run
from helpers.tiny import PAD, assert_real_pool, build_pool, padded
from helpers.training import arguments
from helpers.words import collate, rows_of, tokenizer
from peft_sapt import ArmCallback, PromptMaskCollator, create_optimizer
from peft_sapt.arm.objective import attention_loss
from peft_sapt.errors import PromptError


@pytest.fixture
def training(pool):
    assert_real_pool(pool.attention_weights(**padded(ROWS)))
    return pool.train()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(training, reentrant) -> None:
    model, seq2seq = training, training.config.is_encoder_decoder
    first, second = batch_of(ROWS[:2], seq2seq), batch_of(ROWS[2:], seq2seq)

    def one() -> torch.Tensor:
        return model(**first, use_cache=False).loss

    def two(of=model) -> torch.Tensor:
        return of(**first, use_cache=False).loss + 2 * of(**second, use_cache=False).loss

    plain, plain_two = gradients_of(model, one), gradients_of(model, two)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = 0
    layer = next(m for m in model.modules() if hasattr(m, "sapt_A"))

    def count(*args) -> None:
        nonlocal calls
        calls += 1

    handle = layer.register_forward_hook(count)
    assert_same(gradients_of(model, one), plain)
    assert calls == 2, "the layer must have been run again, or this test is void"
    handle.remove()
    assert_same(gradients_of(model, two), plain_two)
    twin = copy.deepcopy(model)
    assert_same(gradients_of(twin, lambda: two(twin)), plain_two)
    model.gradient_checkpointing_disable()
    assert_same(gradients_of(model, two), plain_two)


def test_checkpointing_leaves_with_the_pool(training) -> None:
    training.gradient_checkpointing_enable({"use_reentrant": False})
    training(**batch_of(ROWS, training.config.is_encoder_decoder), use_cache=False).loss.backward()
    base = training.unload()
    kinds = {type(f).__module__ for m in base.modules() if (f := m.__dict__.get("_gradient_checkpointing_func"))}
    assert kinds and not any(kind.startswith("peft_sapt") for kind in kinds)


@pytest.mark.parametrize("how", ["position_ids", "seq_idx"])
def test_packed_rows_have_weights_of_their_own(how) -> None:
    model = build_pool("llama", ["a", "b", "c"]).train()
    batch = batch_of(ROWS)
    plain = model(**batch).logits
    whole = model(**packed(ROWS, how), use_cache=False).logits[0]
    at = 0
    for row, logits in zip(ROWS, plain, strict=True):
        torch.testing.assert_close(whole[at : at + len(row)], logits[: len(row)], atol=1e-4, rtol=0)
        at += len(row)
    answers = sum(len(row) - PROMPT for row in ROWS)

    def summed(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = batch["labels"][:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / answers

    assert_same(gradients_of(model, lambda: summed(packed(ROWS, how))), gradients_of(model, lambda: summed(batch)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_packed_rows_under_checkpointing(reentrant) -> None:
    model = build_pool("llama", ["a", "b", "c"]).train()
    batch = packed(ROWS, "position_ids")
    plain = gradients_of(model, lambda: model(**batch, use_cache=False).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(gradients_of(model, lambda: model(**batch, use_cache=False).loss), plain)


def test_packed_rows_supervised_from_the_start_are_refused() -> None:
    model = build_pool("llama", ["a", "b", "c"]).train()
    batch = packed(ROWS, "position_ids")
    batch["labels"] = batch["input_ids"].masked_fill(batch["position_ids"] == 0, -100)
    with pytest.raises(PromptError, match="PromptMaskCollator"):
        model(**batch)
    mask = batch["position_ids"] < PROMPT
    plain = model(**packed(ROWS, "position_ids")).logits
    torch.testing.assert_close(model(**batch, sapt_prompt_mask=mask).logits, plain)


def test_pads_at_the_end_of_a_packed_row_change_nothing() -> None:
    model = build_pool("llama", ["a", "b", "c"]).train()
    batch = packed(ROWS, "position_ids")
    wide = {
        "input_ids": F.pad(batch["input_ids"], (0, 3), value=PAD),
        "labels": F.pad(batch["labels"], (0, 3), value=-100),
        "position_ids": F.pad(batch["position_ids"], (0, 3)),
    }
    expected, found = model(**batch), model(**wide)
    torch.testing.assert_close(found.logits[:, :-3], expected.logits, atol=1e-5, rtol=1e-4)
    assert_same(gradients_of(model, lambda: model(**wide).loss), gradients_of(model, lambda: model(**batch).loss))
    model.commit_task()
    assert bool(model.base_model.hooks.memory.targets("default").isfinite().all())


def test_label_smoothing_in_the_trainer(tmp_path) -> None:
    """The Trainer keeps the labels from the model; the prompt comes from PromptMaskCollator."""
    smoothing, plain = 0.1, build_pool("llama", ["a", "b", "c"]).train()
    model, rows = copy.deepcopy(plain), rows_of("a", count=8)
    recorded = run(model, tmp_path, rows, PromptMaskCollator(collate), label_smoothing_factor=smoothing)

    batch = collate(rows)
    logits = plain(**batch).logits[:, :-1]
    labels, logs = batch["labels"][:, 1:], F.log_softmax(logits, dim=-1)
    kept = labels != -100
    hard = -logs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)[kept].mean()
    soft = -logs.mean(dim=-1)[kept].mean()
    ((1 - smoothing) * hard + smoothing * soft).backward()
    assert_same(recorded, gradients(plain))


def test_a_loss_of_the_users_own_in_the_trainer(tmp_path) -> None:
    """With ``compute_loss_func`` the labels stay outside of the model; the gradient is that of the model's loss."""
    plain = build_pool("llama", ["a", "b", "c"]).train()
    model, rows = copy.deepcopy(plain), rows_of("a", count=8)

    def own_loss(outputs, labels, num_items_in_batch=None):
        logits, wanted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(logits, wanted, ignore_index=-100)

    recorded = run(model, tmp_path, rows, PromptMaskCollator(collate), loss=own_loss)
    assert_same(recorded, gradients_of(plain, lambda: plain(**collate(rows)).loss))


@pytest.mark.parametrize("router", ["attention", "ridge"])
def test_bfloat16_autocast_in_the_trainer(tmp_path, router) -> None:
    """Gradients are float32 and near those of float32; ARM's term, which has no autocast, is exactly the same."""
    plain = build_pool("llama", ["a", "b", "c"], router=router)
    low, rows = copy.deepcopy(plain), rows_of("a", count=8)
    expected, found = (run(m, tmp_path, rows, collate, bf16=b) for m, b in ((plain, False), (low, True)))
    assert found.keys() == expected.keys() and {g.dtype for g in found.values()} == {torch.float32}
    errors = {k: float((found[k] - g).norm() / g.norm()) for k, g in expected.items() if ".sapt_" in k}
    assert max(errors.values()) < 0.1, errors
    assert max(errors.values()) > 1e-4, "autocast did not run"
    for name in "ab":
        for key, tensor in low.task_state(name).items():
            assert torch.equal(tensor, plain.task_state(name)[key])
    if router == "attention":
        low.load_state_dict(plain.state_dict())
        current, penalties = low.pooled_prompts([collate(rows)]), []
        for model, enabled in ((plain, False), (low, True)):
            model.base_model.hooks.memory.set_replay("default", [current[:2], current[2:4], current[:0]])
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                penalties.append(attention_loss(model.base_model.pool, current))
        assert torch.equal(*penalties)


def test_training_without_labels_in_the_call_warns(tmp_path) -> None:
    model = build_pool("llama", ["a", "b", "c"]).train()
    with pytest.warns(UserWarning, match="PromptMaskCollator"):
        run(model, tmp_path, rows_of("a", count=8), collate, label_smoothing_factor=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Training without labels")
        run(model, tmp_path, rows_of("a", count=8), PromptMaskCollator(collate), label_smoothing_factor=0.1)


def test_accumulation_equals_one_large_batch(tmp_path) -> None:
    rows = rows_of("a", count=8)
    models = [build_pool("llama", ["a", "b", "c"]) for _ in range(2)]
    whole = run(models[0], tmp_path, rows, collate, per_device_train_batch_size=8)
    parts = run(models[1], tmp_path, rows, collate, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same(parts, whole)


class EmulatedScaler(TrainerCallback):
    """What mixed fp16 does on CUDA: losses are scaled before the backward, gradients unscaled before the step."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        trainer = self.trainer
        wrapped = AcceleratedOptimizer(trainer.optimizer.optimizer, device_placement=False, scaler=self.scaler)
        trainer.optimizer = trainer.callback_handler.optimizer = wrapped
        trainer.accelerator.scaler = self.scaler


@pytest.mark.parametrize("scaled", [False, True])
def test_loss_scaling_does_not_shrink_arms_term(tmp_path, scaled) -> None:
    """The step's gradient is that of the language model plus ARM's, at full size, with and without a GradScaler."""
    rows = rows_of("c", count=8)
    model = build_pool("llama", ["a"])
    for name in ("b", "c"):
        model.commit_task(torch.randn(6, 64), replay=torch.randn(6, 64))
        model.add_task(name)
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "sapt_B"):
                layer.sapt_B["default"].weight.normal_(std=0.1)
    arm = ArmCallback(tokenizer(), replay="rows", align_steps=0)
    twin = copy.deepcopy(model)
    record, scaling = Record(), EmulatedScaler()
    args = arguments(tmp_path, max_steps=1, max_grad_norm=0, per_device_train_batch_size=8)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=collate,
        callbacks=[arm, record, *([scaling] if scaled else [])],
        optimizers=create_optimizer(model, args),
    )
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(rows)
    scaling.trainer = trainer
    trainer.train()
    factor = 1024.0 if scaled else 1.0
    found = {n: g / factor for n, g in record.gradients.items()}
    other = ArmCallback(tokenizer(), replay="rows", align_steps=0)
    other.prepare(twin, [collate(rows)])
    penalty = other.penalty(twin, seed=arm.seed_of(args, twin.base_model))
    assert float(penalty.detach()) > 0.1
    (twin.train()(**collate(rows)).loss + penalty).backward()
    assert_same(found, gradients(twin))


def test_pads_that_are_end_tokens_are_no_samples() -> None:
    """Without a pad token of its own, only the restarting positions tell the padding of a packed row."""
    model = build_pool("llama", ["a", "b", "c"]).train()
    model.config.pad_token_id = model.config.eos_token_id
    batch = packed(ROWS, "position_ids")
    wide = {
        "input_ids": F.pad(batch["input_ids"], (0, 3), value=2),
        "labels": F.pad(batch["labels"], (0, 3), value=-100),
        "position_ids": F.pad(batch["position_ids"], (0, 3)),
    }
    model(**wide)
    assert sum(len(rows) for rows in model.base_model.hooks.memory.seen("default")) == len(ROWS)
    arm = ArmCallback(tokenizer(), replay="rows")
    arm.take_batches(model.base_model.pool, [wide])
    assert arm.prompts == [row[:PROMPT] for row in ROWS] and arm.rows == len(ROWS)
    model.commit_task([wide])


def test_a_packed_sample_without_a_marked_prompt_is_refused() -> None:
    model = build_pool("llama", ["a", "b", "c"]).train()
    batch = packed(ROWS, "position_ids")
    mask = batch["position_ids"] < PROMPT
    mask[:, : len(ROWS[0])] = False
    with pytest.raises(PromptError, match=r"Packed samples \[0\]"):
        model(**batch, sapt_prompt_mask=mask)
