"""ARM as a Trainer callback: align the attention, replay while training, reflect and commit at the end."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from ..errors import ReflectionError, TaskError
from ..files import write_atomically
from ..model import SaptModel
from ..pool import sharding_of
from .checks import can_generate, check_arguments, check_task_of_rows, closed_form, isolated_rng, pool_of
from .generator import GeneratorSettings
from .objective import align_attention, attention_loss
from .processes import agree
from .prompts import read_task
from .pseudo import MIN_PSEUDO_SAMPLES, wanted_count
from .replay import draw_pseudo_samples

if TYPE_CHECKING:
    from transformers import TrainingArguments

LOG_PREFIX = "attention/"
UNREFLECTED = (
    "The model is sharded, so task {name!r} is trained but not committed: save it, load the pool in one process, and "
    "call arm.prepare(model, batches) and arm.reflect(model) there."
)


class ArmCallback(TrainerCallback):
    """The attentive reflection module (SAPT, section 3.3), for the stock ``Trainer`` and ``Seq2SeqTrainer``.

    - ``on_train_begin``: pools the task's training prompts; in a pool of two tasks or more, fits the attention to the
      replay rows of old tasks and the new task's prompts, so that training starts behind an open gate.
    - ``on_step_begin``: once per optimizer step, adds the gradient of [`attention_loss`]: KL to the stored targets on
      replay rows, balanced by a floor under the new task's own weight.
    - ``on_train_end``: fits the attention once more, so that old tasks have theirs back and the new one keeps what it
      ended with; fits the generator, draws pseudo-samples, and commits the task with its attention target.
      Of a model sharded by FSDP2, this part is left to one process afterwards, and a warning says so.
    - With ``router="ridge"`` it shows the prompts to the router before training and commits the task at the end; there
      is nothing to replay, so no generator runs.
    - ``on_log``: adds ``attention/<task>``, the mean weight of each task on the current task's prompts.

    Args:
        tokenizer: of the base model; it needs an end token and a pad token.
        replay: what stands for a task later: "generated" pseudo-samples (the paper) or its own real "rows".
        pseudo_share, min_pseudo_samples: replay rows per task: 2 % of its training rows (the paper), at least 20.
        kl_weight: weight of the replay term, averaged over old tasks (lambda in the paper).
        gate_weight, gate_floor: weight of the gate term, and the own weight above which it is silent.
        align_steps, align_learning_rate: the fits of the attention before and after training; 0 steps switch them off.
        batch_size: prompts of the current task in each attention step.
        max_rows: training prompts considered, evenly spaced over the training set.
        generator: [`GeneratorSettings`].
        allow_copies: keep pseudo-samples that repeat a training row verbatim.
        seed: of alignment and generator; the Trainer's seed by default.

    Attributes:
        reports: per committed task, counts of the drawing ([`PseudoReport`]) as a dict.
        pseudo_samples: per committed task, the texts drawn; ``save_replay(folder)`` writes them.

    Raises:
        ReflectionError: the tokenizer lacks a token, an old task has no replay rows, the generator gave
            too few usable samples, ...
        TaskError: the current task is committed already, or the training rows belong to another one.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        replay: str = "generated",
        pseudo_share: float = 0.02,
        min_pseudo_samples: int = MIN_PSEUDO_SAMPLES,
        kl_weight: float = 1.0,
        gate_weight: float = 1.0,
        gate_floor: float = 0.9,
        align_steps: int = 400,
        align_learning_rate: float = 2e-3,
        batch_size: int = 64,
        max_rows: int = 2048,
        generator: GeneratorSettings | None = None,
        allow_copies: bool = False,
        seed: int | None = None,
    ) -> None:
        if getattr(tokenizer, "pad_token_id", None) is None or getattr(tokenizer, "eos_token_id", None) is None:
            raise ReflectionError(
                "ArmCallback needs a tokenizer with a pad token and an end token: set tokenizer.pad_token = "
                "tokenizer.eos_token, or a token of its own."
            )
        if replay not in ("generated", "rows"):
            raise ReflectionError(f"ArmCallback(replay=...) must be 'generated' or 'rows', got {replay!r}.")
        if not 0 < gate_floor < 1:
            raise ReflectionError(f"ArmCallback(gate_floor=...) must lie between 0 and 1, got {gate_floor}.")
        self.tokenizer = tokenizer
        self.replay = replay
        self.pseudo_share, self.min_pseudo_samples = pseudo_share, min_pseudo_samples
        self.weights: dict[str, Any] = {"kl_weight": kl_weight, "gate_weight": gate_weight, "gate_floor": gate_floor}
        self.align_steps, self.align_learning_rate = align_steps, align_learning_rate
        self.batch_size, self.max_rows = batch_size, max_rows
        self.generator = GeneratorSettings() if generator is None else generator
        self.allow_copies, self.seed = allow_copies, seed
        self.reports: dict[str, dict[str, object]] = {}
        self.pseudo_samples: dict[str, list[str]] = {}
        self.prompts: list[list[int]] = []  # token ids of the current task's prompts
        self.pooled: Tensor | None = None  # [n, d]
        self.rows = 0

    # --- the Trainer's events -----------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        pool = pool_of(model)
        check_arguments(args)
        if sharding_of(model) == "FSDP1":
            raise ReflectionError(
                "ArmCallback cannot reach parameters that FSDP1 has flattened: use FSDP2 (fsdp_version: 2), or DDP."
            )
        check_task_of_rows(loader.dataset, pool)
        self.check_pool(pool)
        self.take_prompts(pool, loader.dataset, loader.collate_fn)
        self.open_task(pool, model, self.seed_of(args, pool), resumed=state.global_step > 0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        pool = pool_of(kwargs["model"])
        if len(pool.tasks) > 1 and not closed_form(pool):
            loss = self.penalty(pool, self.seed_of(args, pool) + state.global_step)
            # a GradScaler divides all gradients by its scale before the step, so this one has to carry it too
            scaler = getattr(kwargs.get("optimizer"), "scaler", None)
            (loss if scaler is None else scaler.scale(loss)).backward()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or self.pooled is None or "loss" not in logs:
            return
        pool = pool_of(kwargs["model"])
        with torch.no_grad():
            means = pool.prompt_router.attend(self.pooled, pool.pool_name).mean(dim=0).tolist()
        shown = {f"{LOG_PREFIX}{name}": round(mean, 4) for name, mean in zip(pool.tasks, means, strict=True)}
        logs.update(shown)
        state.log_history[-1].update(shown)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        if sharding_of(model) is None:
            self.reflect(model, self.seed_of(args, pool_of(model)))
        else:
            warnings.warn(UNREFLECTED.format(name=pool_of(model).current_task), stacklevel=2)

    # --- the steps of ARM, for loops of your own ----------------------------------------------------------------

    def prepare(self, model: Any, batches: Iterable[Mapping[str, Tensor]], seed: int = 0) -> None:
        """What ``on_train_begin`` does, for a loop without the Trainer; ``batches`` are forward's arguments."""
        pool = pool_of(model)
        self.check_pool(pool)
        self.take_batches(pool, batches)
        self.open_task(pool, model, seed)

    def penalty(self, model: Any, seed: int = 0) -> Tensor:
        """The attention loss of one optimizer step; add its gradient once per step. Needs two tasks or more."""
        pool = pool_of(model)
        if closed_form(pool):
            raise ReflectionError("A closed-form router needs no replay, so there is no attention loss to add.")
        if self.pooled is None:
            raise ReflectionError(
                "ArmCallback.penalty() needs the task's prompts: call prepare(model, batches) first."
            )
        rows = torch.randperm(len(self.pooled), generator=torch.Generator().manual_seed(seed))[: self.batch_size]
        current = self.pooled[rows.to(self.pooled.device)]
        return attention_loss(pool.attention, pool.pool_name, current, **self.weights)

    def reflect(self, model: Any, seed: int = 0) -> None:
        """Give old tasks their attention back, draw the replay rows of the current task, and commit it."""
        pool = pool_of(model)
        if self.pooled is None:
            raise ReflectionError(
                "ArmCallback.reflect() needs the task's prompts: call prepare(model, batches) first."
            )
        name = pool.current_task
        if closed_form(pool):
            self.reports[name] = {"wanted": 0, "kept": 0, "closed_form_rows": len(self.pooled)}
            pool.commit_task(self.pooled)
            self.pooled, self.prompts = None, []
            return
        wanted = wanted_count(self.rows, self.pseudo_share, self.min_pseudo_samples)
        if len(pool.tasks) > 1 and self.align_steps:
            with torch.no_grad():
                kept = pool.prompt_router.attend(self.pooled, pool.pool_name).mean(dim=0)
            self.align(pool, seed, kept)
        if self.replay == "rows":
            picked = torch.randperm(len(self.pooled), generator=torch.Generator().manual_seed(seed))[:wanted]
            replay: Tensor = self.pooled[picked.to(self.pooled.device)]
            self.reports[name] = {"wanted": wanted, "kept": len(replay), "real_rows": True}
        else:
            drawn = draw_pseudo_samples(
                model, self.tokenizer, self.prompts, wanted, self.generator, self.allow_copies, seed
            )
            self.reports[name] = drawn.report.to_dict()
            replay = drawn.pooled(pool)
            self.pseudo_samples[name] = drawn.texts
        agree([replay])
        pool.commit_task(self.pooled, replay)
        self.pooled, self.prompts = None, []

    def save_replay(self, folder: str | os.PathLike) -> None:
        """Write the pseudo-samples of each task to ``folder/replay/<task>.jsonl``, one {"text": ...} per line."""
        target = Path(folder) / "replay"
        target.mkdir(parents=True, exist_ok=True)
        for name, texts in self.pseudo_samples.items():
            lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
            write_atomically(target / f"{name}.jsonl", lines.encode())

    # --- parts --------------------------------------------------------------------------------------------------

    def open_task(self, pool: SaptModel, model: Any, seed: int, resumed: bool = False) -> None:
        """See that the current task's gate is open before its first step."""
        if closed_form(pool):
            if not pool.attention.learned(pool.pool_name)[-1]:
                pool.fit_router(self.pooled)  # type: ignore[arg-type]
        elif len(pool.tasks) > 1 and not resumed and self.align_steps:
            with isolated_rng(seed, model):
                self.align(pool, seed)

    def align(self, pool: SaptModel, seed: int, own_target: Tensor | None = None) -> None:
        assert self.pooled is not None
        align_attention(
            pool.attention,
            pool.pool_name,
            self.pooled,
            steps=self.align_steps,
            learning_rate=self.align_learning_rate,
            batch_size=self.batch_size * 4,
            seed=seed,
            own_target=own_target,
            **self.weights,
        )
        if sharding_of(pool.attention) is None:
            agree(p for p in pool.attention.parameters() if p.requires_grad)

    def check_pool(self, pool: SaptModel) -> None:
        if self.replay == "generated" and not can_generate(pool) and not closed_form(pool):
            raise ReflectionError(
                f"A {type(pool.model).__name__} writes no text, so it cannot generate pseudo-samples: use "
                "ArmCallback(replay='rows')."
            )
        if pool.committed_tasks == pool.tasks:
            raise TaskError(
                f"The current task {pool.current_task!r} is committed: call model.add_task(name) before training new "
                "data, or model.reopen_task() to train this one further."
            )
        counts = [len(rows) for rows in pool.attention.replay(pool.pool_name)]
        bare = [name for name, count in zip(pool.tasks[:-1], counts, strict=False) if not count]
        if bare and not closed_form(pool):
            raise ReflectionError(
                f"Old tasks {bare} have no replay rows, so nothing would hold their attention. Commit a task with "
                "ArmCallback, or with commit_task(inputs, replay=batches), before the next one is added."
            )

    def take_prompts(self, pool: SaptModel, dataset: Any, collate: Any) -> None:
        with isolated_rng(0, None):
            if isinstance(dataset, IterableDataset):
                raise ReflectionError(
                    "ArmCallback reads the training set before training: give a map-style dataset (with len())."
                )
            count = min(self.max_rows, len(dataset))
            picked = [i * len(dataset) // count for i in range(count)]
            subset = torch.utils.data.Subset(dataset, picked)
            self.take_batches(pool, DataLoader(subset, batch_size=32, shuffle=False, collate_fn=collate))
            # packed rows hold several samples each, all of which are counted in pooled
            self.rows = round(len(self.pooled) * len(dataset) / count)  # type: ignore[arg-type]

    def take_batches(self, pool: SaptModel, batches: Iterable[Mapping[str, Tensor]]) -> None:
        self.pooled, self.prompts = read_task(pool, batches)
        self.rows = len(self.pooled)
        if self.replay == "generated" and not self.prompts and not closed_form(pool):
            raise ReflectionError("Without input_ids no generator can be trained: use ArmCallback(replay='rows').")

    def seed_of(self, args: TrainingArguments, pool: SaptModel) -> int:
        return (args.seed if self.seed is None else self.seed) + 1_000_003 * len(pool.tasks)
