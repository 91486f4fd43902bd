"""ARM as a Trainer callback: align the attention, replay while training, reflect and commit at the end."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from ..errors import ReflectionError
from ..pool import warm_start
from ..pool.model_methods import check_loads, check_no_loads, was_checked
from ..pool.view import Pool
from ..pool_module import sharding_of
from ..storage.checkpoints import mark, refuse_incomplete
from .checks import (
    check_arguments,
    check_optimizer,
    check_task_of_rows,
    isolated_rng,
    pool_of,
    warn_of_fast_attention,
)
from .progress import quiet
from .reflection import Reflection
from .signs import warn_of_flat_loss, warn_of_short_reach

if TYPE_CHECKING:
    from transformers import TrainingArguments

LOG_PREFIX = "attention/"
UNREFLECTED = (
    "The model is sharded, so task {name!r} is trained but not committed: save it, load the pool in one process, and "
    "call arm.prepare(model, batches) and arm.reflect(model) there."
)


class ArmCallback(Reflection, TrainerCallback):
    """The attentive reflection module (SAPT, section 3.3), for the stock ``Trainer`` and ``Seq2SeqTrainer``.

    - ``on_train_begin``: pools the task's training prompts; shows the pool everyday prompts, which belong to no task,
      and keeps statistics of the task's own, see ``SaptConfig.fallback``; in a pool of two tasks or more, fits the
      attention to replay of old tasks and to the new task's prompts, so that its block has weight from the start.
    - ``on_step_begin``: once per optimizer step, adds the gradient of [`attention_loss`]: KL to the stored targets on
      replay rows, balanced by a floor under the new task's own weight.
    - ``on_train_end``: fits the attention once more, so that old tasks have theirs back and the new one keeps what it
      ended with; with ``replay="generated"`` fits the generator and draws pseudo-samples; commits the task with its
      attention target.
      Of a model sharded by FSDP2, this part is left to one process afterwards, and a warning says so.
    - With ``router="ridge"`` it shows the prompts to the router before training and commits the task at the end; there
      is nothing to replay, so no generator runs.
    - ``on_pre_optimizer_step``: stops at a loss, gradient or weight that is not finite, before the step is taken.
    - ``on_save``: marks a checkpoint as complete; going on from one without the mark is refused.
    - ``on_log``: adds ``attention/<task>``, the mean weight of each task on the current task's prompts.

    Args:
        tokenizer: of the base model; it needs an end token and a pad token.
        replay: what stands for a task later: "statistics" of its prompts, of which fresh ones are drawn in every step;
            "generated" pseudo-samples (the paper); or some of its own real "rows".
        pseudo_share, min_pseudo_samples: replay rows per task: 2 % of its training rows (the paper), at least 20.
        kl_weight: weight of the replay term, averaged over old tasks (lambda in the paper).
        floor_weight, new_task_floor: weight of the floor term, and the new task's weight above which it is silent.
        align_steps, align_learning_rate: the fits of the attention before and after training; 0 steps switch them off.
        batch_size: prompts of the current task in each attention step.
        max_rows: training prompts considered, evenly spaced over the training set.
        generator: [`GeneratorSettings`].
        allow_copies: keep pseudo-samples that repeat a training row verbatim.
        seed: of alignment and generator; the Trainer's seed by default.
        generator_folder: keep each task's generator in a folder of its name there, as a plain LoRA adapter, so that
            ``redraw(model, task)`` can draw from it again without data.
        templates: how a task's prompts may also be written, in which the pool is to know them: texts with ``{}`` for
            the prompt, or "chat", the tokenizer's chat template, if it has one.
        progress: whether to say what it does where that takes seconds, in a bar or in lines of a log; unless
            ``TrainingArguments(disable_tqdm=True)``, by default.
        warm_start: start each new block at the mixture of the older ones, see ``SaptModel.warm_start``.

    Attributes (of the pool that it worked on last; one callback may serve several):
        reports: per committed task, counts of the drawing ([`PseudoReport`]) as a dict.
        shares: per task, where a warm start began.
        pseudo_samples: per committed task, the texts drawn; ``save_replay(folder)`` writes them.

    Raises:
        ReflectionError: the tokenizer lacks a token, an old task has no replay rows, the generator gave
            too few usable samples, ...
        TaskError: the current task is committed already, or the training rows belong to another one.
        TrainingError: a loss, gradient or weight is NaN or infinite, or the optimizer does not hold what is to train.
        CheckpointError: an incomplete checkpoint.
    """

    is_fresh = True  # whether the block that the Trainer trains had not been trained before

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_loads(kwargs.get("model"))

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
        pool.memory.refuse_untrainable(pool.adapter)
        check_optimizer(model, pool, kwargs.get("optimizer"))
        warn_of_fast_attention(pool, kwargs.get("optimizer"))
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.global_step and not was_checked(model) and folder.is_dir():  # loaded by accelerate, say
            refuse_incomplete(folder)
        self.is_fresh = not warm_start.has_started(pool)
        if self.is_fresh:
            warn_of_short_reach(pool, kwargs.get("optimizer"), state.max_steps)
        with quiet(self.is_quiet(args)):
            self.take_prompts(pool, loader.dataset, loader.collate_fn)
            self.open_task(pool, model, self.seed_of(args, pool), resumed=state.global_step > 0)
        self.guard.attach(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        pool = pool_of(kwargs["model"])
        if len(pool.tasks) > 1 and pool.router.needs_replay:
            loss = self.penalty(kwargs["model"], self.seed_of(args, pool) + state.global_step)
            # a GradScaler divides all gradients by its scale before the step, so this one has to carry it too
            scaler = getattr(kwargs.get("optimizer"), "scaler", None)
            (loss if scaler is None else scaler.scale(loss)).backward()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, scaler = kwargs["model"], getattr(kwargs.get("optimizer"), "scaler", None)
        task = pool_of(model).current_task
        self.guard.check(model, task, state.global_step + 1, self.tokenizer, scaled=scaler is not None)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            mark(folder)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        pool = pool_of(kwargs["model"])
        if logs is None or self.pooled is None or self.opened is None or "loss" not in logs:
            return
        if not self.opened.is_of(pool):
            return
        means = pool.mean_weights(self.pooled).tolist()
        shown = {f"{LOG_PREFIX}{name}": round(mean, 4) for name, mean in zip(pool.tasks, means, strict=True)}
        logs.update(shown)
        state.log_history[-1].update(shown)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        self.guard.detach()
        check_no_loads(model)
        pool = pool_of(model)
        if sharding_of(model) is None:
            with quiet(self.is_quiet(args)):
                self.reflect(model, self.seed_of(args, pool))
            if self.is_fresh:
                warn_of_flat_loss(pool.current_task, state.log_history, state.max_steps)
        else:
            warnings.warn(UNREFLECTED.format(name=pool_of(model).current_task), stacklevel=2)

    def take_prompts(self, pool: Pool, dataset: Any, collate: Any) -> None:
        """Read at most ``max_rows`` training rows, evenly spaced; raises [`ReflectionError`] for a stream of rows."""
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
            self.rows = round(len(self.pooled) * len(dataset) / count)  # type: ignore[arg-type]  # set by take_batches

    def is_quiet(self, args: TrainingArguments) -> bool:
        """Whether nothing is to be said of what takes long: as the callback was told, or as the Trainer was."""
        return bool(args.disable_tqdm) if self.progress is None else not self.progress

    def seed_of(self, args: TrainingArguments, pool: Pool) -> int:
        """The callback's seed, or the Trainer's, apart for each task."""
        return (args.seed if self.seed is None else self.seed) + 1_000_003 * len(pool.tasks)
