"""Prompts of tasks that the pool does not have: they get a mixture, without anybody naming anything."""

from __future__ import annotations

from peft import PeftModel
from tqdm.auto import tqdm

from .answering import evaluate, weights_of_prompts
from .learner import Bench
from .method import Found


def score_unseen(bench: Bench, model: PeftModel, names: list[str]) -> Found:
    """Score in percent on each task of ``names``: the mixture of the pool's own attention, the base model, and each
    block of the pool alone; beside them the mean attention on its prompts."""
    found: Found = {}
    for name in tqdm(names, desc="unseen tasks"):
        with model.disable_adapter():
            base = evaluate(bench, model, [name])[0]
        mean = weights_of_prompts(bench, model, name).mean(dim=0).tolist()
        found[name] = {
            "mixture": evaluate(bench, model, [name])[0],
            "base": base,
            "blocks": {block: evaluate(bench, model, [name], sapt_task=block)[0] for block in model.tasks},
            "weights": dict(zip(model.tasks, mean, strict=True)),
        }
    return found
