"""A pool before and after optimizer steps: what moves, bytes of its tasks, its logits."""

from __future__ import annotations

import hashlib

import torch

from helpers.tiny import padded, token_rows

ROWS = token_rows([5, 9, 3, 14])


def step(model, count: int = 3) -> None:
    """A few optimizer steps that move everything that may move."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.005, weight_decay=0.1)
    model.train()
    batch = padded(ROWS)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, : -(1 + len(ROWS[2]) // 2)] = -100
    for _ in range(count):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def digests(model, name: str) -> dict[str, str]:
    return {
        key: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for key, t in model.task_state(name).items()
    }


def logits(model, **kwargs) -> torch.Tensor:
    batch = padded(ROWS)
    extra = {"decoder_input_ids": batch["input_ids"][:, -2:]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(**batch, **extra, **kwargs).logits
