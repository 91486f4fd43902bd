"""A method of continual learning, and the one loop that takes any of them through a stream and scores it."""

from __future__ import annotations

import time
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import set_seed

from ..arm.progress import say
from .answering import answers, mean_score, scored_rows
from .learner import Bench
from .scoring import Labels, label_set, warn_of_cut_answers
from .streams import Row

Found = dict[str, Any]
NAN = float("nan")


class Method:
    """Learns one task after another and answers rows; subclasses say how.

    ``kept_apart``: what is learned later cannot change the answers to older tasks, which are then scored once.
    ``knows_task``: answers may use the task's name (upper bounds). ``alone``: scores are those of models trained on
    one task each, against which FWT is measured.
    """

    title = "method"
    kept_apart = False
    knows_task = False
    alone = False
    model: Any = None

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        set_seed(bench.budget.seed)

    def learn(self, name: str) -> None:
        """Learn task ``name``, whose rows are seen now and not again."""
        raise NotImplementedError

    def answers(self, name: str, rows: list[Row], **how: Any) -> list[str]:
        """Greedy answers to ``rows``, which are of task ``name``; ``how`` goes to [`answers`]."""
        return answers(self.bench, self.model, rows, **how)

    def stored_bytes(self) -> int:
        """Bytes kept beside the base model: blocks, keys, replay."""
        if not isinstance(self.model, PeftModel):
            return 0
        kept = (own_state(self.model, adapter) for adapter in self.model.peft_config)
        return sum(tensor.numel() * tensor.element_size() for state in kept for tensor in state.values())

    def after_stage(self, stage: int) -> None:
        """Called when the tasks up to ``stage`` have been learned and scored."""

    def note_scores(self, scores: dict[str, float]) -> None:
        """Called with the score on each task at the end, in percent."""

    def extra_results(self) -> Found:
        """What only this method reports, asked for after the last stage."""
        return {}

    def save(self, folder: Any) -> None:
        """Save what was learned, as PEFT does."""
        self.model.save_pretrained(folder)


def own_state(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """What saving one adapter would write; the base's embeddings are not looked up on the Hub for it."""
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def task_type(bench: Bench) -> str:
    return "SEQ_2_SEQ_LM" if bench.encoder_decoder else "CAUSAL_LM"


def lora_config(bench: Bench) -> LoraConfig:
    return LoraConfig(
        task_type=task_type(bench),
        r=bench.budget.r,
        lora_alpha=bench.budget.lora_alpha,  # type: ignore[arg-type]  # PEFT takes floats
        layers_to_transform=bench.upper_layers(),
    )


def learn_stream(method: Method) -> Found:
    """Take ``method`` through its bench's stream.

    Returns a dict with ``matrix`` R [T][T], row i after stage i, NaN above the diagonal, in percent; ``constrained``,
    the same with answers held to the task's own labels, NaN for tasks of free text; ``validation``, the scores on the
    validation rows at the end; ``stored_bytes`` after each stage; and what only this method reports.
    """
    bench = method.bench
    names = list(bench.stream)
    for name in names:
        warn_of_cut_answers(bench.tokenizer, name, bench.stream[name]["train"], bench.budget.max_answer)
    labels = {name: labels_of(bench, name) for name in names}
    matrix: list[list[float]] = []
    constrained: list[list[float]] = []
    stored = []
    for stage, name in enumerate(names):
        say(f"{method.title}: task {stage + 1} of {len(names)}, {name}")
        method.learn(name)
        for rows, held in ((matrix, False), (constrained, True)):
            known = rows[-1][:stage] if method.kept_apart and stage else []
            asked = names[len(known) : stage + 1]
            now = [score_task(method, task, labels[task] if held else None, held=held) for task in asked]
            rows.append(known + now + [NAN] * (len(names) - stage - 1))
        stored.append(method.stored_bytes())
        method.after_stage(stage)
        mean = sum(matrix[-1][: stage + 1]) / (stage + 1)
        say(f"  {name} scores {matrix[-1][stage]:.1f} %, all tasks so far {mean:.1f} % on average")
    method.note_scores(dict(zip(names, matrix[-1], strict=True)))
    found: Found = {"matrix": matrix, "constrained": constrained, "stored_bytes": stored}
    if method.alone:
        found["single"] = list(matrix[-1])
    found["validation"] = [score_task(method, name, None, split="validation") for name in names]
    return found | method.extra_results()


def labels_of(bench: Bench, name: str) -> Labels | None:
    known = label_set(bench.stream[name])
    return None if known is None else Labels(bench.tokenizer, known, bench.budget.max_answer)


def score_task(
    method: Method, name: str, labels: Labels | None, split: str | None = None, held: bool = False
) -> float:
    """Mean score on a task in percent; NaN if answers are to be held to labels that it does not have."""
    if held and labels is None:
        return NAN
    begun, bench = time.perf_counter(), method.bench
    rows = scored_rows(bench, name, split)
    score = mean_score(bench, rows, method.answers(name, rows, labels=labels))
    bench.seconds["evaluation"] = bench.seconds.get("evaluation", 0.0) + time.perf_counter() - begun
    return score
