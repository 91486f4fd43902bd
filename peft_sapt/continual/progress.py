"""Progress of the training steps on one task: a bar that is gone when they are done, or lines where no terminal is."""

from __future__ import annotations

import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..arm.progress import EVERY, in_terminal, say


class TaskProgress(TrainerCallback):
    """Steps, and the last loss that was logged."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: Any = None
        self.loss = ""
        self.begun = self.said = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if in_terminal():
            self.bar = tqdm(total=state.max_steps, desc=f"  learning {self.name}", leave=False)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.begun:
            self.begun = self.said = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.update(1)
        elif time.monotonic() - self.said >= EVERY:
            self.said = time.monotonic()
            say(f"  learning {self.name}: {state.global_step} of {state.max_steps} steps{self.loss}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.loss = f", loss {float(logs['loss']):.3f}"
            if self.bar is not None:
                self.bar.set_postfix(loss=logs["loss"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        seconds = time.monotonic() - (self.begun or time.monotonic())
        say(f"  {self.name}: {state.global_step} steps in {seconds:.0f} s{self.loss}")
