"""Pseudo-samples of a task: fit the generator to its prompts, draw, select, and pool what was kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ReflectionError
from ..model import SaptModel
from .checks import isolated_rng
from .generator import PREFIX, GeneratorSettings, draw, end_token, fit, generator_adapter, without_closing
from .pseudo import PseudoReport, Selection


@dataclass
class PseudoSamples:
    """What a drawing gave: token rows with what closes them, their texts, and the counts."""

    rows: list[list[int]]
    closing: list[int]
    texts: list[str]
    report: PseudoReport
    name: str

    def pooled(self, pool: SaptModel) -> Tensor:
        """Pooled prompts of the rows, [n, d].

        Raises:
            ReflectionError: there are fewer rows than wanted.
        """
        report = self.report
        if report.kept < report.wanted:
            raise ReflectionError(
                f"The generator of task {self.name!r} gave {report.kept} usable pseudo-samples of {report.wanted} "
                f"wanted, out of {report.drawn} drawn ({report.unfinished} without end, {report.empty} empty, "
                f"{report.duplicates} repeated, {report.copies} copies of training rows). The task is trained but not "
                "committed: call arm.reflect(model) after changing arm.generator (epochs, temperature), "
                "arm.allow_copies or arm.replay = 'rows'."
            )
        device = pool.attention.weight.device
        return pool.pooled_prompts({"input_ids": torch.tensor([r + self.closing], device=device)} for r in self.rows)


def draw_pseudo_samples(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    wanted: int,
    settings: GeneratorSettings,
    allow_copies: bool,
    seed: int,
) -> PseudoSamples:
    """Fit a generator LoRA on ``model`` (a PeftModel) to ``prompts`` and draw ``wanted`` rows, or as many as it gives.

    Neither the pool nor torch's random state is changed.
    """
    prompts, closing = without_closing(prompts, tokenizer.eos_token_id)
    end = end_token(tokenizer, prompts)
    start = tokenizer(PREFIX, add_special_tokens=False).input_ids
    selection = Selection(wanted, prompts, set(tokenizer.all_special_ids), allow_copies)
    longest = max(map(len, prompts)) + 8
    with isolated_rng(seed, model), generator_adapter(model, settings):
        losses = fit(model, prompts, start, end, settings, seed)
        draw(model, selection, start, end, tokenizer.pad_token_id, longest, settings)
    selection.report.generator_loss = [round(losses[0], 4), round(losses[-1], 4)]
    texts = tokenizer.batch_decode(selection.kept)
    return PseudoSamples(selection.kept, closing, texts, selection.report, model.base_model.current_task)
