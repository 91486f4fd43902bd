"""What the others are measured against: no learning, no care, one block per task with its id, all data at once."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, get_peft_model
from transformers import set_seed

from .answering import answers
from .learner import Bench, encoded, train
from .method import Method, lora_config
from .streams import Row


class NoLearning(Method):
    """The base model, which learns nothing."""

    title = "base model"
    kept_apart = True

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.model = bench.fresh()

    def learn(self, name: str) -> None:
        pass

    def save(self, folder: Any) -> None:
        """Nothing was learned, so nothing is written."""


class Sequential(Method):
    """One LoRA, trained on task after task."""

    title = "sequential LoRA"

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.model = get_peft_model(bench.fresh(), lora_config(bench))

    def learn(self, name: str) -> None:
        train(self.bench, self.model, name, [])


class PerTask(Method):
    """A fresh LoRA for each task, which is named at test time: an upper bound, and FWT's single-task scores."""

    title = "one LoRA per task"
    kept_apart = knows_task = alone = True

    def learn(self, name: str) -> None:
        adapter = self.adapter(name)
        set_seed(self.bench.budget.seed)
        if self.model is None:
            self.model = get_peft_model(self.base(), self.config(), adapter_name=adapter)
        else:
            self.model.add_adapter(adapter, self.config())
        self.model.set_adapter(adapter)
        train(self.bench, self.model, name, [], **self.training())

    def base(self) -> Any:
        return self.bench.fresh()

    def config(self) -> PeftConfig:
        return lora_config(self.bench)

    def training(self) -> dict[str, Any]:
        return {}

    def adapter(self, name: str) -> str:
        """PEFT's name of a task's adapter, whatever characters the task's own has."""
        return f"task_{list(self.bench.stream).index(name)}"

    def answers(self, name: str, rows: list[Row], **how: Any) -> list[str]:
        self.model.set_adapter(self.adapter(name))
        return answers(self.bench, self.model, rows, **how)


class MultiTask(Sequential):
    """One LoRA, trained on the rows of all tasks together before the first is scored: an upper bound of one block."""

    title = "multi-task LoRA"
    kept_apart = True

    def learn(self, name: str) -> None:
        names = list(self.bench.stream)
        if name == names[0]:
            rows = [row for task in names for row in encoded(self.bench, task)]
            train(self.bench, self.model, "all tasks", [], rows=rows)
