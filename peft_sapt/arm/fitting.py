"""Fitting the generator to a task's prompts, stopped early on prompts that it does not learn from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ReflectionError
from ..routing.notices import IGNORED_LABEL
from ..routing.prompt_mask import is_encoder_decoder
from .generator import TASK, GeneratorSettings
from .progress import counted


@dataclass
class Fitted:
    """Loss of each step, loss on the held-out prompts after each pass, and the step whose weights were kept."""

    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    best_step: int = 0


def fit(
    model: Any, prompts: list[list[int]], start: list[int], eos: int, settings: GeneratorSettings, seed: int
) -> Fitted:
    """Teach the active generator to write ``prompts`` after ``start``; it ends with the weights of its best pass.

    Raises:
        ReflectionError: the loss is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    training, held_out = split(prompts, settings.validation_share, seed)
    order = torch.Generator().manual_seed(seed)
    steps, one_pass = settings.steps(len(training)), -(-len(training) // settings.batch_size)
    found, best, without_gain = Fitted(best_step=steps), [p.detach().clone() for p in parameters], 0
    queue: list[int] = []
    for step in counted(range(1, steps + 1), "fitting the generator, steps", steps):
        while len(queue) < min(settings.batch_size, len(training)):
            queue += torch.randperm(len(training), generator=order).tolist()
        rows, queue = queue[: settings.batch_size], queue[settings.batch_size :]
        model.train()
        loss = loss_of(model, [training[i] for i in rows], start, eos)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        found.losses.append(checked(loss, step, settings))
        if held_out and (step % one_pass == 0 or step == steps):
            found.held_out.append(mean_loss(model, held_out, start, eos, settings))
            without_gain += 1
            if found.held_out[-1] <= min(found.held_out):
                without_gain, found.best_step = 0, step
                best = [p.detach().clone() for p in parameters]
            if without_gain >= settings.patience:
                break
    if held_out:
        for parameter, value in zip(parameters, best, strict=True):
            parameter.data.copy_(value)
    return found


def split(prompts: list[list[int]], share: float, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts to learn from and, ``share`` of the different ones, to validate on; none of these if below two."""
    different = list(dict.fromkeys(map(tuple, prompts)))
    count = round(share * len(different))
    if count < 2 or count == len(different):
        return prompts, []
    picked = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    held_out = {different[i] for i in picked}
    return [p for p in prompts if tuple(p) not in held_out], [list(p) for p in different if p in held_out]


def checked(loss: Tensor, step: int, settings: GeneratorSettings) -> float:
    value = float(loss.detach())
    if not torch.isfinite(loss.detach()):
        raise ReflectionError(
            f"The generator's loss is {value} at step {step}: lower its learning rate ({settings.learning_rate}) with "
            "ArmCallback(generator=GeneratorSettings(learning_rate=...))."
        )
    return value


@torch.no_grad()
def mean_loss(model: Any, prompts: list[list[int]], start: list[int], eos: int, settings: GeneratorSettings) -> float:
    """Mean loss per token over ``prompts``, without dropout."""
    model.eval()
    total, tokens = 0.0, 0
    for i in range(0, len(prompts), settings.batch_size):
        batch = prompts[i : i + settings.batch_size]
        count = sum(len(prompt) + 1 for prompt in batch)
        total += count * float(loss_of(model, batch, start, eos))
        tokens += count
    return total / tokens


def loss_of(model: Any, prompts: list[list[int]], start: list[int], eos: int) -> Tensor:
    batch = training_batch(prompts, start, eos, encoder_decoder=is_encoder_decoder(model))
    device = next(model.parameters()).device
    loss: Tensor = model(**{k: v.to(device) for k, v in batch.items()}, sapt_task=TASK, use_cache=False).loss
    return loss


def training_batch(prompts: list[list[int]], start: list[int], eos: int, encoder_decoder: bool) -> dict[str, Tensor]:
    """``start`` -> prompt, end token: as one row with masked start, or as encoder input and decoder labels."""
    heads = [] if encoder_decoder else start
    rows = [[*heads, *prompt, eos] for prompt in prompts]
    width = max(map(len, rows))
    labels = torch.full((len(rows), width), IGNORED_LABEL)
    ids = torch.full((len(rows), width), eos)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, len(heads) : len(row)] = torch.tensor(row[len(heads) :])
        mask[i, : len(row)] = 1
    if not encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    source = torch.tensor(start).repeat(len(rows), 1)
    return {"input_ids": source, "attention_mask": torch.ones_like(source), "labels": labels}
