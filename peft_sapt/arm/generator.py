"""The generator of ARM: one more LoRA on the same base, fitted to a task's own prompts, drawn from, then put away.

Sapt-wise it is a pool of one task, whose attention is 1, i.e. plain LoRA; PEFT adds, switches and deletes it as any
adapter, so base, pool and optimizer state of the user are untouched.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from ..config import SaptConfig
from ..errors import ReflectionError
from ..routing.prompt_mask import is_encoder_decoder
from .progress import counted
from .pseudo import Selection

ADAPTER = "sapt_generator"
TASK = "generator"
PREFIX = "__gen__"


@dataclass
class GeneratorSettings:
    """How the generator is fitted and drawn from; rank, alpha, dropout, learning rate, batch and top_k are the
    release's. Its 5000 steps are an upper bound here: ``epochs`` passes over the prompts end the fit earlier, and so
    do ``patience`` passes without a better loss on ``validation_share`` of the prompts, which it does not learn from.
    The weights of the best pass are kept. A share of 0 switches this off."""

    r: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    learning_rate: float = 1e-3
    batch_size: int = 16
    max_steps: int = 5000
    epochs: float = 10.0
    validation_share: float = 0.1
    patience: int = 3
    top_k: int = 20
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    draw_batch_size: int = 32
    max_draws: int = 10  # times the wanted count

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ReflectionError(f"GeneratorSettings.patience must be 1 or more passes, got {self.patience}.")
        if not 0 <= self.validation_share < 1:
            raise ReflectionError(
                f"GeneratorSettings.validation_share must lie in [0, 1), got {self.validation_share}; 0 switches the "
                "early stop off."
            )

    def steps(self, rows: int) -> int:
        return max(1, min(self.max_steps, round(self.epochs * rows / self.batch_size)))


@contextmanager
def generator_adapter(model: Any, settings: GeneratorSettings) -> Iterator[None]:
    """Put a fresh generator LoRA on ``model`` (a PeftModel) in place of the pool, and take it away at the end."""
    pool, training = model.base_model.pool, model.training
    own = pool.config
    config = SaptConfig(
        task_type=own.task_type,
        task_name=TASK,
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=None if own.block == "prompt" else own.target_modules,
        exclude_modules=own.exclude_modules,
        layers_to_transform=own.layers_to_transform,
        layers_pattern=own.layers_pattern,
        query_dim=1,
        features="mean",  # its only block has all the attention: nothing need be told apart
    )
    model.add_adapter(ADAPTER, config)
    try:
        model.set_adapter(ADAPTER)
        yield
    finally:
        model.set_adapter(pool.adapter, inference_mode=bool(own.inference_mode))
        model.delete_adapter(ADAPTER)
        model.train(training)


@torch.no_grad()
def draw(
    model: Any,
    selection: Selection,
    start: list[int],
    eos: int,
    pad: int,
    max_tokens: int,
    settings: GeneratorSettings,
) -> None:
    """Sample rows from the active generator into ``selection`` until it is full or ``max_draws`` is spent."""
    model.eval()
    device, size = next(model.parameters()).device, settings.draw_batch_size
    budget = settings.max_draws * selection.report.wanted
    for _ in counted(count(1), "drawing pseudo-samples, batches"):
        if selection.missing <= 0 or selection.report.drawn >= budget:
            break
        ids = torch.tensor(start, device=device).repeat(size, 1)
        try:
            rows = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=settings.top_k,
                temperature=settings.temperature,
                repetition_penalty=settings.repetition_penalty,
                max_new_tokens=max_tokens,
                eos_token_id=eos,
                pad_token_id=pad,
            )
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            size = halved(size, error)
            continue
        skip = 1 if is_encoder_decoder(model) else len(start)
        for row in rows[:, skip:].tolist():
            finished = eos in row
            selection.offer(row[: row.index(eos)] if finished else row, finished)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is a device's or the CPU allocator's way to say that memory is spent."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def halved(size: int, error: BaseException) -> int:
    """Half of a batch that did not fit; raises [`ReflectionError`] if it was one row."""
    if size == 1:
        raise ReflectionError(
            "Not even one row fits into memory while the generator draws: free memory, or use "
            "ArmCallback(replay='rows')."
        ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    warnings.warn(f"Out of memory while drawing {size} rows at once: going on with {size // 2}.", stacklevel=2)
    return size // 2


def without_closing(prompts: list[list[int]], eos: int) -> tuple[list[list[int]], list[int]]:
    """Prompts without the end token that some tokenizers (T5's) append, and what was taken off: [eos] or nothing."""
    if not all(prompt and prompt[-1] == eos for prompt in prompts):
        return prompts, []
    return [prompt[:-1] for prompt in prompts], [eos]


def end_token(tokenizer: Any, prompts: list[list[int]]) -> int:
    """A special token that no prompt contains, to end a generated prompt: the end token, unless chat turns use it.

    Raises:
        ReflectionError: every special token occurs in the prompts.
    """
    used = {token for prompt in prompts for token in prompt}
    free = [token for token in (tokenizer.eos_token_id, *tokenizer.all_special_ids) if token not in used]
    if not free:
        raise ReflectionError(
            "Every special token of the tokenizer occurs in the prompts, so nothing could end a generated one: add a "
            "special token to the tokenizer, or use ArmCallback(replay='rows')."
        )
    return free[0]
