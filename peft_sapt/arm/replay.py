"""Pseudo-samples of a task: fit the generator to its prompts or take a kept one, draw, select, pool what was kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ReflectionError
from ..pool.view import Pool
from .checks import isolated_rng
from .fitting import fit
from .generator import PREFIX, TASK, GeneratorSettings, draw, end_token, generator_adapter, without_closing
from .ownership import block_digest
from .pseudo import PseudoReport, Selection, digest_of
from .stored import Drawing, read_drawing, write_generator


@dataclass
class PseudoSamples:
    """What a drawing gave: token rows with what closes them, their texts, and the counts."""

    rows: list[list[int]]
    closing: list[int]
    texts: list[str]
    report: PseudoReport
    name: str

    def pooled(self, pool: Pool, cure: str) -> Tensor:
        """Pooled prompts of the rows, [n, d].

        Raises:
            ReflectionError: there are fewer rows than wanted; it ends with ``cure``.
        """
        report = self.report
        if report.kept < report.wanted:
            raise ReflectionError(
                f"The generator of task {self.name!r} gave {report.kept} usable pseudo-samples of {report.wanted} "
                f"wanted, out of {report.drawn} drawn ({report.unfinished} without end, {report.empty} empty, "
                f"{report.duplicates} repeated, {report.copies} copies of training rows). {cure}"
            )
        device = pool.memory.device
        return pool.pooled_prompts({"input_ids": torch.tensor([r + self.closing], device=device)} for r in self.rows)


def draw_pseudo_samples(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    wanted: int,
    settings: GeneratorSettings,
    allow_copies: bool,
    seed: int,
    folder: Path | None = None,
) -> PseudoSamples:
    """Fit a generator LoRA on ``model`` (a PeftModel) to ``prompts`` and draw ``wanted`` rows, or as many as it gives.

    Neither the pool nor torch's random state is changed. The generator is kept in ``folder``, if one is given.
    """
    prompts, closing = without_closing(prompts, tokenizer.eos_token_id)
    drawing = Drawing(
        start=tokenizer(PREFIX, add_special_tokens=False).input_ids,
        end=end_token(tokenizer, prompts),
        closing=closing,
        longest=max(map(len, prompts)) + 8,
        known=sorted({digest_of(prompt) for prompt in prompts}),
        block=block_digest(model.base_model.pool, model.base_model.current_task),
    )
    name = model.base_model.current_task
    with isolated_rng(seed, model), generator_adapter(model, settings):
        fitted = fit(model, prompts, drawing.start, drawing.end, settings, seed)
        if folder is not None:
            write_generator(folder, model, drawing)
        drawn = drawn_from(model, tokenizer, drawing, wanted, settings, allow_copies, name)
    drawn.report.generator_loss = [round(fitted.losses[0], 4), round(fitted.losses[-1], 4)]
    drawn.report.generator_held_out = [round(loss, 4) for loss in fitted.held_out]
    drawn.report.generator_step = fitted.best_step
    return drawn


def redraw_pseudo_samples(
    model: Any,
    tokenizer: Any,
    name: str,
    folder: Path,
    wanted: int,
    settings: GeneratorSettings,
    allow_copies: bool,
    seed: int,
) -> PseudoSamples:
    """Draw ``wanted`` rows of task ``name`` again from the generator in ``folder``; no data is needed.

    Raises:
        ReflectionError, LoraFolderError: the folder holds no generator, or that of another pool or base model.
    """
    drawing = read_drawing(folder)
    if drawing.block is not None and drawing.block != block_digest(model.base_model.pool, name):
        raise ReflectionError(
            f"The generator in {folder} is not that of task {name!r} of this pool: another pool's task of this name, "
            "or a later training of it, has been written there. Give each pool a generator_folder of its own."
        )
    with isolated_rng(seed, model), generator_adapter(model, settings):
        model.import_task(TASK, folder)
        return drawn_from(model, tokenizer, drawing, wanted, settings, allow_copies, name)


def drawn_from(
    model: Any,
    tokenizer: Any,
    drawing: Drawing,
    wanted: int,
    settings: GeneratorSettings,
    allow_copies: bool,
    name: str,
) -> PseudoSamples:
    """Rows from the active generator."""
    selection = Selection(wanted, drawing.known, set(tokenizer.all_special_ids), allow_copies)
    draw(model, selection, drawing.start, drawing.end, tokenizer.pad_token_id, drawing.longest, settings)
    return PseudoSamples(
        selection.kept, drawing.closing, tokenizer.batch_decode(selection.kept), selection.report, name
    )
