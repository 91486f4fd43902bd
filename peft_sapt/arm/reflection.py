"""The steps of ARM, whoever calls them: the Trainer's callback, or a loop of your own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ReflectionError, TaskError
from ..hub.card import refresh_card
from ..pool import lifecycle, warm_start
from ..pool.view import Pool
from ..pool_module import sharding_of
from ..routing.hidden import longest_prompt
from ..storage.atomic import write_atomically
from ..storage.replay_rows import note_rows, stored_replay
from .checks import can_generate, isolated_rng, pool_of
from .everyday import pooled_rows, renderings_of, show_everyday_prompts
from .generator import GeneratorSettings
from .guard import Guard
from .objective import align_attention, attention_loss
from .old_rows import note_prompts, refuse_new_rows_alone
from .ownership import Ledger, Opened
from .processes import broadcast_from_rank0
from .progress import counted, quiet
from .pseudo import MIN_PSEUDO_SAMPLES, wanted_count
from .replay import draw_pseudo_samples, redraw_pseudo_samples
from .signs import warn_of_closed_gate

MAX_RENDERED = 512  # prompts that are rendered once more
REPLAY = {"statistics": "statistics", "rows": "real rows", "generated": "pseudo-samples"}  # and what a card calls them
UNCOMMITTED = (
    "The task is trained but not committed: call arm.reflect(model) after changing arm.generator (epochs, "
    "temperature), arm.allow_copies or arm.replay = 'rows'."
)
UNCHANGED = "Nothing was changed: change arm.generator (temperature, max_draws) or arm.allow_copies, or ask for fewer."


class Reflection:
    """Prompts of the current task, the attention loss, and what commits a task; see [`ArmCallback`]."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        replay: str = "statistics",
        pseudo_share: float = 0.02,
        min_pseudo_samples: int = MIN_PSEUDO_SAMPLES,
        kl_weight: float = 1.0,
        floor_weight: float = 1.0,
        new_task_floor: float = 0.9,
        align_steps: int = 400,
        align_learning_rate: float = 2e-3,
        batch_size: int = 64,
        max_rows: int = 2048,
        generator: GeneratorSettings | None = None,
        allow_copies: bool = False,
        seed: int | None = None,
        warm_start: bool = False,
        generator_folder: str | os.PathLike | None = None,
        templates: Sequence[str] | str = "chat",
        progress: bool | None = None,
    ) -> None:
        if getattr(tokenizer, "pad_token_id", None) is None or getattr(tokenizer, "eos_token_id", None) is None:
            raise ReflectionError(
                "ArmCallback needs a tokenizer with a pad token and an end token: set tokenizer.pad_token = "
                "tokenizer.eos_token, or a token of its own."
            )
        if replay not in REPLAY:
            raise ReflectionError(f"ArmCallback(replay=...) must be one of {list(REPLAY)}, got {replay!r}.")
        if not 0 < new_task_floor < 1:
            raise ReflectionError(f"ArmCallback(new_task_floor=...) must lie between 0 and 1, got {new_task_floor}.")
        self.tokenizer = tokenizer
        self.replay = replay
        self.pseudo_share, self.min_pseudo_samples = pseudo_share, min_pseudo_samples
        self.weights: dict[str, Any] = {
            "kl_weight": kl_weight,
            "floor_weight": floor_weight,
            "new_task_floor": new_task_floor,
        }
        self.align_steps, self.align_learning_rate = align_steps, align_learning_rate
        self.batch_size, self.max_rows = batch_size, max_rows
        self.generator = GeneratorSettings() if generator is None else generator
        self.allow_copies, self.seed, self.warm_start = allow_copies, seed, warm_start
        self.generator_folder = None if generator_folder is None else Path(generator_folder)
        wrong = [] if isinstance(templates, str) else [text for text in templates if text.count("{}") != 1]
        if wrong or (isinstance(templates, str) and templates != "chat"):
            raise ReflectionError(
                f"ArmCallback(templates=...) must be 'chat' or texts with one {{}}, got {templates!r}."
            )
        self.templates, self.progress = templates, progress
        self.ledger = Ledger()
        self.opened: Opened | None = None  # the task that prompts and pooled are of
        self.prompts: list[list[int]] = []  # token ids of the current task's prompts
        self.pooled: Tensor | None = None  # [n, d]
        self.every: Tensor | None = None  # [m, d], of these prompts and of their renderings
        self.groups: Tensor | None = None  # [m], which prompt each of them is
        self.rows = 0
        self.guard = Guard()  # watches while the Trainer trains

    @property
    def reports(self) -> dict[str, dict[str, object]]:
        """Per task of the pool that was worked on last, counts of the drawing ([`PseudoReport`])."""
        return self.ledger.last.reports

    @property
    def pseudo_samples(self) -> dict[str, list[str]]:
        """Per committed task of the pool that was worked on last, the texts drawn."""
        return self.ledger.last.texts

    @property
    def shares(self) -> dict[str, dict[str, float]]:
        """Per task of the pool that was worked on last, where a warm start began."""
        return self.ledger.last.shares

    def prepare(self, model: Any, batches: Iterable[Mapping[str, Tensor]], seed: int = 0) -> None:
        """What ``on_train_begin`` does, for a loop without the Trainer.

        Args:
            batches: of the task's training set, as forward's arguments: ``input_ids`` [B, S] and so on.

        Raises:
            ReflectionError, TaskError: as the class says.
        """
        pool = pool_of(model)
        with quiet(self.progress is False):
            self.check_pool(pool)
            self.take_batches(pool, batches)
            self.open_task(pool, model, seed)

    def penalty(self, model: Any, seed: int = 0) -> Tensor:
        """The attention loss of one optimizer step, a scalar [`attention_loss`]; add its gradient once per step.

        Needs two tasks or more.

        Raises:
            ReflectionError: the router needs no replay, or ``prepare`` has not been called.
        """
        pool = pool_of(model)
        if not pool.router.needs_replay:
            raise ReflectionError(f"router={pool.config.router!r} needs no replay: there is no attention loss to add.")
        self.check_opened(pool, "penalty")
        assert self.every is not None
        rows = torch.randperm(len(self.every), generator=torch.Generator().manual_seed(seed))[: self.batch_size]
        current = self.every[rows.to(self.every.device)]
        return attention_loss(pool, current, **self.weights, seed=seed)

    def reflect(self, model: Any, seed: int = 0) -> None:
        """Give old tasks their attention back, draw the replay rows of the current task, and commit it.

        Raises:
            ReflectionError: ``prepare`` has not been called, or too few pseudo-samples came; the task stays open then.
        """
        pool = pool_of(model)
        self.check_opened(pool, "reflect")
        lifecycle.refuse_unmoved(pool)
        with quiet(self.progress is False):
            self.end_task(pool, model, seed)

    def redraw(self, model: Any, name: str, count: int | None = None, seed: int = 0) -> None:
        """Draw the replay rows of a committed task again from its stored generator, without any data of the task.

        Its attention target stays; ``reports`` and ``pseudo_samples`` get the new rows.

        Args:
            count: rows to draw; as many as the pool keeps of this task by default, at least ``min_pseudo_samples``.

        Raises:
            TaskError: there is no such task, or it is not committed.
            ReflectionError: no ``generator_folder`` was given, it holds no generator of this task, too few usable
                rows came, or the router needs no replay. Nothing is changed then.
        """
        pool = pool_of(model)
        index = pool.index_of(name)
        if not pool.router.needs_replay:
            raise ReflectionError(f"router={pool.config.router!r} keeps no replay rows, so there is nothing to draw.")
        if name not in pool.committed_tasks:
            raise TaskError(f"Task {name!r} is not committed yet: reflect() draws its rows.")
        if self.generator_folder is None:
            raise ReflectionError("redraw() needs ArmCallback(generator_folder=...), where the generators are.")
        rows = pool.memory.replay(pool.adapter)
        wanted = max(len(rows[index]), self.min_pseudo_samples) if count is None else count
        drawn = redraw_pseudo_samples(
            model,
            self.tokenizer,
            name,
            self.generator_folder / name,
            wanted,
            self.generator,
            self.allow_copies,
            seed,
        )
        rows[index] = drawn.pooled(pool, UNCHANGED).to(rows[index])
        broadcast_from_rank0([rows[index]])
        told = self.ledger.of(pool)
        told.reports[name], told.texts[name] = drawn.report.to_dict(), drawn.texts
        told.rows[name] = rows[index].detach().clone()
        pool.memory.set_replay(pool.adapter, rows)

    def save_replay(self, folder: str | os.PathLike) -> None:
        """Write the pseudo-samples of each task to ``folder/replay/<task>.jsonl``, one {"text": ...} per line.

        In a folder with a saved pool, or with folders of pools, the texts of their replay rows; otherwise those of the
        pool that was worked on last. Texts of other pools are never written.
        """
        target = Path(folder) / "replay"
        target.mkdir(parents=True, exist_ok=True)
        saved = [rows for path in (Path(folder), *Path(folder).iterdir()) if (rows := stored_replay(path)) is not None]
        told = [self.ledger.texts_for(rows) for rows in saved] if saved else [self.pseudo_samples]
        for name, texts in {name: texts for found in told for name, texts in found.items()}.items():
            lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
            write_atomically(target / f"{name}.jsonl", lines.encode())
        note_rows(target, {name: rows for found in saved for name, rows in found.items()})
        refresh_card(folder)  # which says that there is text

    # --- parts --------------------------------------------------------------------------------------------------

    def check_opened(self, pool: Pool, what: str) -> None:
        """Raises [`ReflectionError`] unless the prompts at hand are those of the current task of ``pool``."""
        if self.pooled is None or self.opened is None:
            raise ReflectionError(
                f"ArmCallback.{what}() needs the task's prompts: call prepare(model, batches) first."
            )
        if not self.opened.is_of(pool):
            raise ReflectionError(
                f"ArmCallback.{what}() was called for task {pool.current_task!r}, but the prompts at hand are of "
                f"{self.opened.task!r}, or of another model or a copy: call prepare(model, batches) for this one."
            )

    def close(self, pool: Pool) -> None:
        """The task is committed: note its prompts, and let go of them."""
        note_prompts(pool, pool.current_task, self.prompts)
        weight = float(pool.memory.targets(pool.adapter)[-1, -1])
        self.let_go()
        warn_of_closed_gate(pool, weight, self.align_steps, ended=True)

    def let_go(self) -> None:
        """Forget the prompts at hand."""
        self.pooled, self.every, self.groups, self.opened, self.prompts = None, None, None, None, []

    def open_task(self, pool: Pool, model: Any, seed: int, resumed: bool = False) -> None:
        """See that the current task has a weight of its own before its first step, and its block where it is to start.

        Raises:
            ReflectionError: there are no prompts.
        """
        assert self.pooled is not None and self.every is not None
        try:
            refuse_new_rows_alone(pool, self.prompts, self.rows)
        except ReflectionError:
            self.let_go()
            raise
        pool.memory.undone.pop(pool.adapter, None)  # from here on the task is worked on
        if not (resumed and pool.statistics.known(pool.adapter)[-1]) and sharding_of(pool.base) is None:
            show_everyday_prompts(pool, self.tokenizer, self.prompts)
            pool.statistics.fit(pool.adapter, self.every, self.groups)
            broadcast_from_rank0(pool.statistics.state_tensors(pool.adapter))
        if self.warm_start and len(pool.tasks) > 1 and not resumed and not warm_start.has_started(pool):
            self.ledger.of(pool).shares[pool.current_task] = warm_start.warm_start(pool, self.pooled)
            broadcast_from_rank0(p for p in model.parameters() if p.requires_grad)
        if not pool.router.needs_replay:
            if not pool.router.is_fitted(pool.adapter) or (pool.adapter in pool.statistics.reopened and not resumed):
                lifecycle.fit_router(pool, self.every, statistics=False)
                broadcast_from_rank0(pool.router.state_of(pool.adapter).values())
        elif len(pool.tasks) > 1 and not resumed and self.align_steps:
            with isolated_rng(seed, model):
                self.align(pool, seed)
        if not resumed and sharding_of(pool.base) is None:
            warn_of_closed_gate(pool, float(pool.mean_weights(self.pooled)[-1]), self.align_steps, ended=False)

    def end_task(self, pool: Pool, model: Any, seed: int) -> None:
        """What [`reflect`] says, once it may."""
        assert self.pooled is not None
        pool.memory.training_of(pool.adapter).block_is_held = True  # ARM's own steps from here on are not the user's
        name, told = pool.current_task, self.ledger.of(pool)
        learned = pool.router.needs_replay
        lifecycle.record_task(pool, name, rows=self.rows, replay=REPLAY[self.replay] if learned else "none")
        if not learned:
            told.reports[name] = {"wanted": 0, "kept": 0, "router_rows": len(self.pooled)}
            lifecycle.commit_task(pool, self.pooled, statistics=False)
            self.close(pool)
            return
        replay: Tensor
        wanted = wanted_count(self.rows, self.pseudo_share, self.min_pseudo_samples)
        if len(pool.tasks) > 1 and self.align_steps:
            self.align(pool, seed, own_target=pool.mean_weights(self.pooled))
        if self.replay == "statistics":
            replay = self.pooled[:0]
            told.reports[name] = {"wanted": 0, "kept": 0, "statistics_of": len(self.pooled)}
            told.texts.pop(name, None)
        elif self.replay == "rows":
            picked = torch.randperm(len(self.pooled), generator=torch.Generator().manual_seed(seed))[:wanted]
            replay = self.pooled[picked.to(self.pooled.device)]
            told.reports[name] = {"wanted": wanted, "kept": len(replay), "real_rows": True}
            told.texts.pop(name, None)
        else:
            drawn = draw_pseudo_samples(
                model,
                self.tokenizer,
                self.prompts,
                wanted,
                self.generator,
                self.allow_copies,
                seed,
                None if self.generator_folder is None else self.generator_folder / name,
            )
            told.reports[name] = drawn.report.to_dict()
            replay = drawn.pooled(pool, UNCOMMITTED)
            told.texts[name] = drawn.texts
        broadcast_from_rank0([replay])
        if len(replay):
            told.rows[name] = replay.detach().clone()
        lifecycle.commit_task(pool, self.pooled, replay, statistics=False)
        self.close(pool)

    def align(self, pool: Pool, seed: int, own_target: Tensor | None = None) -> None:
        """Fit the attention alone, see [`align_attention`]; ``own_target`` [T] is what the current task is to keep."""
        assert self.every is not None
        align_attention(
            pool,
            self.every,
            steps=self.align_steps,
            learning_rate=self.align_learning_rate,
            batch_size=self.batch_size * 4,
            seed=seed,
            own_target=own_target,
            **self.weights,
        )
        if sharding_of(pool.router) is None:
            broadcast_from_rank0(p for p in pool.router.parameters() if p.requires_grad)

    def check_pool(self, pool: Pool) -> None:
        """Raises [`ReflectionError`] or [`TaskError`] if the task cannot train, or old ones not be replayed."""
        if self.replay == "generated" and not can_generate(pool) and pool.router.needs_replay:
            raise ReflectionError(
                f"A {type(pool.base).__name__} writes no text, so it cannot generate pseudo-samples: use "
                "ArmCallback(replay='statistics')."
            )
        if self.replay == "statistics" and not pool.config.statistics_rank and pool.router.needs_replay:
            raise ReflectionError(
                "ArmCallback(replay='statistics') needs them, and statistics_rank=0 keeps none: use replay='rows' "
                "or 'generated', or a pool that keeps them."
            )
        if pool.committed_tasks == pool.tasks:
            raise TaskError(
                f"The current task {pool.current_task!r} is committed: call model.add_task(name) before training new "
                "data, or model.reopen_task() to train this one further."
            )
        held = zip(pool.tasks, pool.memory.replay(pool.adapter), pool.statistics.known(pool.adapter), strict=True)
        bare = [name for name, rows, known in held if not len(rows) and not known and name != pool.current_task]
        if bare and pool.router.needs_replay:
            raise ReflectionError(
                f"Old tasks {bare} have neither replay rows nor statistics, so nothing would hold their attention. "
                "Commit a task with ArmCallback, or with commit_task(inputs=batches), before the next one is added."
            )

    def take_batches(self, pool: Pool, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Keep the task's pooled prompts [n, d], and their tokens for the generator.

        Raises:
            ReflectionError: there are no rows; or no tokens, and pseudo-samples are wanted.
        """
        self.prompts, self.opened = [], Opened.of(pool)
        total = len(batches) if isinstance(batches, Sized) else None
        batches = counted(batches, f"{pool.current_task}: reading its prompts, batches", total)
        pooled = pool.pooled_prompts(batches, tokens=self.prompts, remember=True)
        self.pooled = pooled[~pooled[:, 0].isnan()]  # rows of padding alone have no prompt
        self.rows = len(self.pooled)
        if not self.rows:
            self.pooled = None
            raise ReflectionError("The training set is empty.")
        step = max(1, -(-len(self.prompts) // MAX_RENDERED))
        rendered = renderings_of(self.tokenizer, self.prompts[::step], self.templates)
        limit = longest_prompt(pool.base) or sys.maxsize
        short = [i for i, row in enumerate(rendered) if len(row) <= limit]
        others = pooled_rows(pool, [rendered[i] for i in short], "reading its prompts in the chat template")
        self.every = torch.cat([self.pooled, others])
        numbers = torch.tensor([*range(self.rows), *(i * step for i in short)], device=self.pooled.device)
        self.groups = numbers.clamp(max=self.rows - 1)
        if self.replay == "generated" and not self.prompts and pool.router.needs_replay:
            raise ReflectionError("Without input_ids no generator can be trained: use ArmCallback(replay='rows').")
