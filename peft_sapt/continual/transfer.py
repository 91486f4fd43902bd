"""Knowledge transfer: a task learned from few rows after a related one, against the same rows alone.

The older task is learned once for each seed; every pool then goes on from a copy of it. All arms get the same rows,
the same number of optimizer steps and the same test rows, and no task is named at test time.
"""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass, field, replace
from statistics import NormalDist, mean, stdev
from typing import Any

from peft import PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import set_seed

from ..errors import StreamError
from .answering import evaluate, weights_of_prompts
from .learner import Bench, train
from .method import Found, lora_config
from .sapt import Recipe, arm_for, sapt_config

ARMS = {
    "ridge": Recipe(config={"router": "ridge"}),
    "ridge-warm": Recipe(config={"router": "ridge"}, arm={"warm_start": True}),
    "learned": Recipe(arm={"replay": "rows"}),
    "learned-warm": Recipe(arm={"replay": "rows", "warm_start": True}),
}
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t by degrees of freedom, 1 to 9


@dataclass
class Few:
    """How a task is learned from few rows: so many of them, in ``steps`` optimizer steps.

    Steps are given to the Trainer as a share of epochs, whose last batch is smaller than the others, so that 40 of
    them are 52, 45 and 42 from 25, 50 and 100 rows: the same for every arm at one count, not between counts.
    """

    rows: list[int] = field(default_factory=lambda: [25, 50, 100])
    steps: int = 40
    old_rows: int = 200


def transfer(bench: Bench, old: str, new: str, few: Few, arms: list[str]) -> Found:
    """Scores on ``new`` in percent for each count of rows: alone, and in a pool that knows ``old``.

    Rows are drawn anew for each seed, the smaller sets inside the larger ones. Beside the scores of each arm it gives
    those of the older task before and after, and the mean weight of both tasks on the new one's test prompts.

    Raises:
        StreamError: ``new`` has fewer training rows than asked for.
    """
    seed, there = bench.budget.seed, len(bench.stream[new]["train"])
    if max(few.rows) > there:
        raise StreamError(f"Task {new!r} has {there} training rows, {max(few.rows)} were asked for: lower the counts.")
    order = random.Random(seed).sample(bench.stream[new]["train"], max(few.rows))
    known = {arm: learn_old(bench, old, ARMS[arm], few) for arm in {arm.removesuffix("-warm") for arm in arms}}
    found: Found = {"old": old, "new": new, "seed": seed, "scores": {}}
    found["old_before"] = {arm: evaluate(bench, model, [old])[0] for arm, model in known.items()}
    for count in tqdm(few.rows, desc=f"{old} -> {new}"):
        own = with_rows(bench, new, order[:count])
        epochs = few.steps * bench.budget.batch_size / count
        set_seed(seed)
        alone = get_peft_model(bench.fresh(), lora_config(bench))
        train(own, alone, new, [], epochs=epochs)
        scores: Found = {"alone": {"test": evaluate(own, alone, [new])[0]}}
        scores["alone"]["validation"] = evaluate(own, alone, [new], "validation")[0]
        for arm in arms:
            model = copy.deepcopy(known[arm.removesuffix("-warm")])
            scores[arm] = learn_new(own, model, old, new, ARMS[arm], epochs)
        found["scores"][str(count)] = scores
    return found


def learn_old(bench: Bench, name: str, recipe: Recipe, few: Few) -> PeftModel:
    """A pool that knows task ``name``."""
    set_seed(bench.budget.seed)
    own = replace(bench, stream={name: bench.stream[name]}, seconds={})
    own.remembering = bench.remembering
    model = get_peft_model(own.fresh(), sapt_config(own, **recipe.config))
    rows = with_rows(own, name, own.stream[name]["train"][: few.old_rows])
    train(rows, model, name, [arm_for(own, **(recipe.arm or {}))], **rates(bench))
    return model


def learn_new(bench: Bench, model: PeftModel, old: str, new: str, recipe: Recipe, epochs: float) -> Found:
    """Learn ``new`` in the pool ``model``, and score both tasks without naming them."""
    set_seed(bench.budget.seed)
    model.add_task(new)
    train(bench, model, new, [arm_for(bench, **(recipe.arm or {}))], epochs=epochs, **rates(bench))
    weights = weights_of_prompts(bench, model, new).mean(dim=0).tolist()
    test = evaluate(bench, model, [new, old])
    validation = evaluate(bench, model, [new], "validation")[0]
    return {"test": test[0], "validation": validation, "old_after": test[1], "weights": weights}


def rates(bench: Bench) -> dict[str, Any]:
    return {"attention_lr": bench.budget.attention_lr, "marks_prompts": True}


def with_rows(bench: Bench, name: str, rows: list[dict[str, Any]]) -> Bench:
    """``bench`` with ``rows`` to train task ``name`` on; the base model stays shared."""
    stream = {**bench.stream, name: {**bench.stream[name], "train": rows}}
    own = replace(bench, stream=stream, seconds={})
    own.remembering = bench.remembering
    return own


def gain_over_alone(found: list[Found], arm: str, rows: int, split: str = "test") -> tuple[float, float, float]:
    """Mean over seeds of the score with the pool minus that alone, and its 95 % interval (Student's t, paired)."""
    gains = [f["scores"][str(rows)][arm][split] - f["scores"][str(rows)]["alone"][split] for f in found]
    return interval(gains)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of two or more values and the ends of its 95 % interval by Student's t."""
    half = student_975(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean(values), mean(values) - half, mean(values) + half


def student_975(freedom: int) -> float:
    """The 0.975 quantile of Student's t: tabulated for few degrees of freedom, else Fisher's expansion in 1 / n."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
