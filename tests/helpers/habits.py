"""Random walks over what people do around a pool, and what must hold whatever they do.

After each habit: a task that was trained has moved; no committed byte has changed; a prompt has the same weights in
training, evaluation, generation and ``attention_weights``; no answer token was in a query; what is stored belongs to
its pool. Whatever does not work ends in an exception of ours.
"""

from __future__ import annotations

import copy
import random
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer

from helpers.habits_watch import ROWS, Subject, Weights, base, check_rows, check_weights, config, no_answers_read
from helpers.tiny import CACHE
from helpers.training import arguments
from helpers.words import collate, prompts_of, rows_of, tokenizer
from peft_sapt import ArmCallback, PromptMaskCollator, create_optimizer, save_pool
from peft_sapt.errors import SaptError

MOST_TASKS = 4
KINDS = [{"router": router, "block": block} for router in ("attention", "ridge") for block in ("lora", "prompt")]


def remove_noise(model: Any) -> None:
    """Take away the hook that a Trainer with NEFTune leaves behind when it is interrupted, whatever interrupts it."""
    table = model.get_base_model().get_input_embeddings()
    for key, hook in list(table._forward_hooks.items()):
        if getattr(hook, "__name__", "") == "neftune_post_forward_hook":
            del table._forward_hooks[key]


class Walk:
    """One walk: its subjects, and the things that people keep."""

    def __init__(self, seed: int) -> None:
        self.random, self.seed, self.done = random.Random(seed), seed, []
        self.kind = KINDS[seed % len(KINDS)]
        self.folder = tempfile.TemporaryDirectory()
        self.arm = ArmCallback(tokenizer(), replay="rows", align_steps=3, min_pseudo_samples=3)
        self.subjects = [Subject(get_peft_model(base(), config(self.kind, "a")))]
        self.runs: list[Trainer] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.caches: list[
            tuple[Subject, Any, torch.Tensor, tuple[str, list[str]]]
        ] = []  # cache, weights, of what pool
        self.refusals: Counter[str] = Counter()
        self.saves = 0

    @property
    def subject(self) -> Subject:
        return self.subjects[0]

    @property
    def model(self) -> Any:
        return self.subject.model

    def ours(self, call: Callable[[], Any]) -> Any:
        """What ``call`` gives; None if it is refused by an exception of ours."""
        try:
            return call()
        except SaptError as error:
            self.refusals[type(error).__name__] += 1
            return None

    def path(self) -> Path:
        self.saves += 1
        return Path(self.folder.name) / str(self.saves)

    # --- training -------------------------------------------------------------------------------------------------

    def rows(self, task: str, seed: int = 0) -> list[dict[str, list[int]]]:
        self.subject.told.setdefault((self.subject.adapter, task), set()).add(task[0])
        return rows_of(task[0], count=ROWS, seed=seed)

    def arguments(self, n: int) -> dict[str, Any]:
        """Settings by the bits of ``n``: noise, evaluation, the best model at the end, checkpointing, smoothing."""
        settings: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 10}
        if n & 1:
            settings["neftune_noise_alpha"] = 5.0
        if n & 2:
            settings |= {"eval_strategy": "steps", "eval_steps": 1}
        if n & 2 and n & 4:
            settings |= {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
        if n & 8:
            settings |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        if n & 16:
            settings |= {"label_smoothing_factor": 0.1, "remove_unused_columns": False}
        return settings

    def opened(self) -> None:
        """Most people train a task that is open; the rest find out."""
        if not self.subject.is_open() and self.random.random() < 0.8:
            self.add_task(0)

    def trainer(self, n: int, with_arm: bool = True) -> Trainer:
        settings, task = self.arguments(n), self.model.current_task
        args = arguments(self.path(), **settings)
        ours = n & 32 and self.subject.is_open()
        made = create_optimizer(self.model, args, attention_lr=1e-3) if ours else (None, None)
        return Trainer(
            self.model, args, train_dataset=self.rows(task), eval_dataset=self.rows(task, seed=1)[:4],
            data_collator=PromptMaskCollator(collate) if n & 16 else collate,
            callbacks=[self.arm] if with_arm else [], optimizers=made,
        )  # fmt: skip

    def trained(self, call: Callable[[], Any], task: str) -> None:
        """Run ``call``, which trains ``task``; if it is committed afterwards, its block must have moved."""
        subject = self.subject
        was_open = subject.is_open() and subject.model.current_task == task
        before = {k: v.clone() for k, v in subject.model.task_state(task).items()}
        finished = self.ours(lambda: (call(), True))
        if not finished:
            remove_noise(subject.model)
        if finished and was_open and task in subject.model.committed_tasks:
            after = subject.model.task_state(task)
            moved = any(not torch.equal(before[k], v) for k, v in after.items() if "_B" in k or "prompt" in k)
            assert moved, f"task {task!r} was trained and committed, and its block never moved"

    def new_trainer(self, n: int) -> None:
        self.opened()
        run = self.ours(lambda: self.trainer(n))
        if run is not None:
            self.runs.append(run)
            self.trained(run.train, self.model.current_task)

    def kept_trainer(self, n: int) -> None:
        """The Trainer of before, with the rows of the task that is open now."""
        self.opened()
        if not self.runs or self.runs[-1].model is not self.model:
            return
        run = self.runs[-1]
        run.train_dataset = self.rows(self.model.current_task)
        self.trained(run.train, self.model.current_task)

    def copied_trainer(self, n: int) -> None:
        self.opened()
        run = copy.deepcopy(self.trainer(n & ~32))
        self.subjects.insert(0, Subject(run.model, dict(self.subject.committed), dict(self.subject.told)))
        self.runs.append(run)
        self.trained(run.train, self.model.current_task)

    def resumed(self, n: int) -> None:
        self.opened()
        if not self.subject.is_open():
            return
        run = self.trainer(n & 3)
        run.args.save_strategy, run.args.save_steps = "steps", 1
        run.args.max_steps = 1
        folder = Path(run.args.output_dir) / "checkpoint-1"
        self.trained(run.train, self.model.current_task)
        if not folder.is_dir():
            return
        self.ours(self.model.reopen_task)
        again = self.trainer(n & 3)
        self.trained(lambda: again.train(resume_from_checkpoint=str(folder)), self.model.current_task)

    def own_loop(self, n: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        if optimizer is None:
            self.opened()
        model, task = self.model, self.model.current_task
        if optimizer is None:
            optimizer = torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad] or [torch.ones(1)], lr=1e-2
            )
            self.optimizers.append(optimizer)
        batch = collate(self.rows(task)[:6])

        def loop() -> None:
            if not model.base_model.router.needs_replay and not model.base_model.router.is_fitted(
                self.subject.adapter
            ):
                model.fit_router([batch])
            model.train()
            for _ in range(2):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            model.commit_task()

        self.trained(loop, task)

    def own_loop_with_arm(self, n: int) -> None:
        self.opened()
        model, batch = self.model, collate(self.rows(self.model.current_task)[:6])

        def loop() -> None:
            self.arm.prepare(model, [batch])
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad] or [torch.ones(1)], lr=0.1)
            model.train()(**batch).loss.backward()
            optimizer.step()
            self.arm.reflect(model)

        self.trained(loop, model.current_task)

    def kept_optimizer(self, n: int) -> None:
        self.opened()
        if self.optimizers:
            self.own_loop(n, self.optimizers[-1])

    def in_a_thread(self, n: int) -> None:
        """Training in a worker; the commit may be here or there."""
        self.opened()
        failed: list[BaseException] = []

        def work() -> None:
            try:
                self.own_loop(n)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]

    def without_arm(self, n: int) -> None:
        """A Trainer without the callback, and a commit by hand."""
        self.opened()
        run = self.trainer(n & ~32, with_arm=False)
        if not self.model.base_model.router.needs_replay:
            self.ours(lambda: self.model.fit_router([collate(self.rows(self.model.current_task))]))
        self.trained(lambda: (run.train(), self.model.commit_task()), self.model.current_task)

    def another_model(self, n: int) -> None:
        """A second model under the same callback, with a task of the same name; then back, or on with it."""
        other = Subject(get_peft_model(base(), config(self.kind, self.random.choice("abc"))))
        self.subjects.insert(0, other)
        self.new_trainer(n)
        if n & 1:
            self.subjects.append(self.subjects.pop(0))

    def evaluated(self, n: int) -> None:
        self.ours(self.trainer(n & ~(4 | 32), with_arm=False).evaluate)

    # --- the life of a pool -----------------------------------------------------------------------------------------

    def add_task(self, n: int) -> None:
        model = self.model
        if len(model.tasks) < MOST_TASKS:
            names = [f"{letter}{i}" for letter in "abc" for i in ("", 2, 3)]
            self.ours(lambda: model.add_task(self.random.choice([name for name in names if name not in model.tasks])))

    def remove_task(self, n: int) -> None:
        name = self.random.choice(self.model.tasks)
        if len(self.model.tasks) > 1 and self.ours(lambda: (self.model.remove_task(name), True)):
            self.subject.committed.pop((self.subject.adapter, name), None)

    def reopen(self, n: int) -> None:
        self.ours(self.model.reopen_task)

    def second_pool(self, n: int) -> None:
        if "second" not in self.model.peft_config:
            self.model.add_adapter("second", config(self.kind, "b"))
        self.model.set_adapter("second" if n & 1 else "default")

    def switched(self, n: int) -> None:
        self.model.set_adapter(self.random.choice(list(self.model.peft_config)))

    def disabled(self, n: int) -> None:
        batch = prompts_of("a", seed=1)
        self.model.eval()
        with self.model.disable_adapter(), torch.no_grad():
            found = self.model(**batch).logits
        if n & 1:
            self.model.base_model.disable_adapter_layers()
            self.model.base_model.enable_adapter_layers()
        with torch.no_grad():
            torch.testing.assert_close(found, base()(**batch).logits)

    def saved_and_loaded(self, n: int) -> None:
        subject, folder = self.subject, self.path()
        if n & 1:
            save_pool(subject.model, folder, self.arm)
        else:
            subject.model.save_pretrained(folder, selected_adapters=[subject.adapter])
            folder = folder if subject.adapter == "default" else folder / subject.adapter
        model = PeftModel.from_pretrained(base(), folder, is_trainable=bool(n & 2))
        known = {
            ("default", task): digest for (pool, task), digest in subject.committed.items() if pool == subject.adapter
        }
        told = {("default", task): rows for (pool, task), rows in subject.told.items() if pool == subject.adapter}
        self.subjects.insert(0, Subject(model, known, told))

    def onto_a_merged_base(self, n: int) -> None:
        """Somebody has merged a LoRA of theirs into the base: the pool must say so."""
        folder = self.path()
        save_pool(self.model, folder)
        targets = [["q_proj"], ["o_proj", "down_proj"], ["gate_proj"], ["v_proj", "up_proj"]][n % 4]
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False)
        merged = get_peft_model(base(), lora).merge_and_unload()
        try:
            PeftModel.from_pretrained(merged, folder)
        except SaptError as error:
            self.refusals[type(error).__name__] += 1
        else:
            raise AssertionError(f"a base with {targets} merged into it passed for the one that was saved with")

    def exported_and_imported(self, n: int) -> None:
        model, folder = self.model, self.path()
        name = self.random.choice(model.tasks)
        if self.ours(lambda: (model.export_task(name, folder), True)) and len(model.tasks) < MOST_TASKS:
            fresh = next(f"c{i}" for i in range(5, 20) if f"c{i}" not in model.tasks)
            self.ours(lambda: model.import_task(fresh if n & 1 else model.current_task, folder))

    # --- asking -----------------------------------------------------------------------------------------------------

    def kept_cache(self, n: int) -> None:
        """A chat: a cache of before goes on, its weights with it."""
        for subject, cache, weights, of in self.caches[-1:]:
            model = subject.model.eval()
            if (subject.adapter, model.tasks) != of:
                continue
            order = self.random.sample(range(len(weights)), len(weights)) if n & 1 else list(range(len(weights)))
            if n & 1:
                cache.reorder_cache(torch.tensor(order))
            with torch.no_grad(), Weights(model) as used:
                model(torch.full((len(weights), 2), 12), **{CACHE: cache})
            torch.testing.assert_close(used.last(), weights[order], atol=1e-6, rtol=0)
            self.caches[-1] = subject, cache, weights[order], of
            return
        model, batch = self.model.eval(), prompts_of("b", seed=2)
        batch = {name: value[:3] for name, value in batch.items()}
        with torch.no_grad():
            cache = model(**batch, use_cache=True)[CACHE]
        of = self.subject.adapter, model.tasks
        self.caches.append((self.subject, cache, model.attention_weights(**batch), of))

    def generated(self, n: int) -> None:
        batch = {name: value[:3] for name, value in prompts_of("c", seed=n).items()}
        with Weights(self.model) as used:
            self.model.eval().generate(**batch, max_new_tokens=2, num_beams=1 + 2 * (n & 1), do_sample=False)
        expected = self.model.attention_weights(**batch)
        for weights in used.seen:
            torch.testing.assert_close(weights, expected.repeat_interleave(len(weights) // 3, 0), atol=1e-6, rtol=0)

    def asked_by_name(self, n: int) -> None:
        name, batch = self.random.choice(self.model.tasks), prompts_of("a", seed=3)
        given = torch.zeros(len(self.model.tasks))
        given[self.model.tasks.index(name)] = 1
        with torch.no_grad():
            model = self.model.eval()
            torch.testing.assert_close(
                model(**batch, sapt_task=name).logits, model(**batch, sapt_weights=given).logits
            )

    # --- what must hold ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        for subject in self.subjects[:2]:
            subject.freeze()
            for (pool, task), digest in subject.committed.items():
                if pool == subject.adapter and task in subject.model.tasks:
                    assert subject.digest(task) == digest, f"bytes of committed task {task!r} changed"
            check_rows(subject)
        check_weights(self.subject, self.random.choice("abc"), self.ours)

    def run(self, length: int) -> None:
        """Take ``length`` habits; an assertion says which came before."""
        habits = [name for name in HABITS for _ in range(3 if name in OFTEN else 1)]
        try:
            with warnings.catch_warnings(), no_answers_read():
                warnings.simplefilter("ignore")
                for _ in range(length):
                    name, n = self.random.choice(habits), self.random.randrange(64)
                    self.done.append(f"{name}({n})")
                    getattr(self, name)(n)
                    self.check()
        except Exception as error:
            raise AssertionError(f"walk {self.seed} {self.kind}: {', '.join(self.done)}: {error!r}") from error
        finally:
            self.folder.cleanup()


NOT_HABITS = {
    "ours",
    "path",
    "rows",
    "arguments",
    "opened",
    "trainer",
    "trained",
    "check",
    "check_rows",
    "check_weights",
    "run",
}
HABITS = [name for name, value in vars(Walk).items() if callable(value) and name[0] != "_" and name not in NOT_HABITS]
OFTEN = {"new_trainer", "add_task", "kept_trainer", "own_loop", "kept_optimizer", "kept_cache"}
