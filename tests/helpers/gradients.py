"""Gradients of a pool, how they are compared, and the batches they are taken on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import Trainer, TrainerCallback

from helpers.tiny import padded, token_rows
from helpers.training import arguments

ROWS = token_rows([9, 12, 7, 14])

PROMPT = 4  # tokens of each row that are its prompt


def batch_of(rows: list[list[int]], encoder_decoder: bool = False) -> dict[str, torch.Tensor]:
    batch = padded(rows, "right")
    if encoder_decoder:
        return {**batch, "labels": batch["input_ids"][:, :5].masked_fill(batch["attention_mask"][:, :5] == 0, -100)}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :PROMPT] = -100
    return {**batch, "labels": labels}


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def gradients_of(model, loss: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss().backward()
    return gradients(model)


BLOCK = ("sapt_A", "sapt_B")

ATTENTION = ("sapt_key", "sapt_query_down", "sapt_query_up", "sapt_query_norm")


def assert_same(
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    tolerance: float = 1e-4,
    parts: tuple[str, ...] = BLOCK + ATTENTION,
) -> None:
    """Per tensor ||difference|| / ||gradient||; at least ``parts``, here block, key and projection, must have one."""
    assert found.keys() == expected.keys()
    for part in parts:
        assert any(f".{part}." in name and bool(g.any()) for name, g in expected.items()), part
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= tolerance * float(gradient.norm()) + 1e-9, name


def packed(rows: list[list[int]], how: str) -> dict[str, torch.Tensor]:
    """``rows`` one after another in a single row, with labels behind each row's prompt."""
    ids = torch.tensor([[t for row in rows for t in row]])
    positions = torch.tensor([[i for row in rows for i in range(len(row))]])
    labels = ids.masked_fill(positions < PROMPT, -100)
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    if how == "seq_idx":
        batch["seq_idx"] = torch.tensor([[n for n, row in enumerate(rows) for _ in row]], dtype=torch.int32)
    return batch


class Record(TrainerCallback):
    """Gradients as they are just before the optimizer's step."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.first: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.gradients = gradients(kwargs["model"])
        self.first = self.first or self.gradients


def run(model, folder, rows, collator, callbacks=(), loss=None, **settings) -> dict[str, torch.Tensor]:
    """One optimizer step of the stock Trainer over ``rows`` in order; the gradients it took."""
    record = Record()
    options = {"max_steps": 1, "max_grad_norm": 0, "remove_unused_columns": False, **settings}
    args = arguments(folder, **options)
    trainer = Trainer(
        model=model, args=args, train_dataset=rows, data_collator=collator, callbacks=[record, *callbacks],
        compute_loss_func=loss,
    )  # fmt: skip
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    return record.gradients
