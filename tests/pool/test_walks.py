"""Random walks over the whole surface: no byte of a frozen task changes, exactly the declared parameters train."""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model

from helpers.campaigns import campaign
from helpers.zoo import Mlp
from peft_sapt import SaptConfig
from peft_sapt.errors import SaptError

SHORTEST, LONGEST = 20, 28  # calls of a walk
D = 6  # token_dim


def config(*tasks: str) -> SaptConfig:
    settings = {"r": 2, "target_modules": ["first", "second"], "token_dim": D, "query_dim": 3, "init_weights": False}
    return SaptConfig(tasks=list(tasks), **settings)


class Walk:
    """A model and what must be true of it: by pool the tasks, whether the newest is open, and bytes of frozen ones."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = get_peft_model(Mlp(), config("t0"))
        self.active, self.tasks, self.open = "default", {"default": ["t0"]}, {"default": True}
        self.frozen: dict[tuple[str, str], str] = {}
        self.count = 0

    # --- calls; each returns nothing and updates what is expected ------------------------------------------------

    def add_task(self, n: int) -> None:
        self.count += 1
        names = self.tasks[self.active]
        if len(names) >= 4:
            return
        self.model.add_task(f"t{self.count}", r=1 + n % 3)
        self.tasks[self.active] = [*names, f"t{self.count}"]
        self.open[self.active] = True
        self.freeze(names)

    def commit_task(self, n: int) -> None:
        inputs = torch.randn(3, D) if n % 2 else None
        if self.open[self.active]:
            self.model.commit_task(inputs, torch.randn(n % 3, D) if n % 3 else None)
            self.open[self.active] = False
            self.freeze(self.tasks[self.active])
        else:
            self.refused(lambda: self.model.commit_task(inputs))

    def reopen_task(self, n: int) -> None:
        self.model.reopen_task()
        self.open[self.active] = True
        self.frozen.pop((self.active, self.tasks[self.active][-1]), None)

    def remove_task(self, n: int) -> None:
        names = self.tasks[self.active]
        name = names[n % len(names)]
        if len(names) == 1:
            return self.refused(lambda: self.model.remove_task(name))
        self.model.remove_task(name)
        if name == names[-1]:
            self.open[self.active] = False  # every older one was committed
        self.tasks[self.active] = [other for other in names if other != name]
        self.frozen.pop((self.active, name), None)

    def rename_refused(self, n: int) -> None:
        self.refused(lambda: self.model.add_task(self.tasks[self.active][0]))
        self.refused(lambda: self.model.add_task("a/b"))
        self.refused(lambda: self.model.remove_task("nobody"))

    def step(self, n: int) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not trained:
            return
        self.model.train()
        optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
        x = torch.randn(2, 3, 12)
        # through the attention, so that key and projection move too
        log_weights = self.model.base_model.router.log_weights(self.active, torch.randn(2, D))
        self.model(x, sapt_weights=log_weights.exp()).square().mean().backward()
        optimizer.step()

    def add_pool(self, n: int) -> None:
        name = f"pool{n % 2}"
        if name in self.tasks:
            return
        names = ["u", "v", "w"][: 1 + n % 3]
        self.model.add_adapter(name, config(*names))
        self.tasks[name], self.open[name] = names, True
        self.freeze(names[:-1], name)

    def switch(self, n: int) -> None:
        self.active = sorted(self.tasks)[n % len(self.tasks)]
        self.model.set_adapter(self.active)
        self.freeze(self.tasks[self.active][:-1])

    def delete_pool(self, n: int) -> None:
        others = sorted(set(self.tasks) - {self.active})
        if others:
            name = others[n % len(others)]
            self.model.delete_adapter(name)
            del self.tasks[name], self.open[name]
            self.frozen = {key: digest for key, digest in self.frozen.items() if key[0] != name}

    def disable(self, n: int) -> None:
        with self.model.disable_adapter():
            self.model(torch.randn(2, 3, 12))

    def modes(self, n: int) -> None:
        self.model.train(bool(n % 2))
        self.model.base_model.enable_adapter_layers()
        self.refused(self.model.merge_and_unload)

    def copied(self, n: int) -> None:
        self.model = copy.deepcopy(self.model)

    def save_and_load(self, n: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, selected_adapters=[self.active])
            source = folder if self.active == "default" else f"{folder}/{self.active}"
            if n % 2:
                self.model.load_adapter(source, self.active, is_trainable=True)
            elif self.tasks.keys() == {"default"}:
                self.model = PeftModel.from_pretrained(self.model.unload(), source, is_trainable=True)

    def exchange(self, n: int) -> None:
        names = self.tasks[self.active]
        if not self.open[self.active]:
            return
        with tempfile.TemporaryDirectory() as folder:
            self.model.export_task(names[n % len(names)], folder)
            self.model.import_task(names[-1], folder)

    # --- what must hold ------------------------------------------------------------------------------------------

    def refused(self, call: Callable[[], object]) -> None:
        before = {k: v.clone() for k, v in self.model.state_dict().items()}
        with pytest.raises(SaptError):
            call()
        after = self.model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)

    def digest(self, task: str) -> str:
        state = self.model.task_state(task)
        return hashlib.sha256(b"".join(state[key].contiguous().numpy().tobytes() for key in sorted(state))).hexdigest()

    def freeze(self, names: list[str], pool: str | None = None) -> None:
        pool = self.active if pool is None else pool
        if pool == self.active:
            for name in names:
                self.frozen.setdefault((pool, name), self.digest(name))

    def check(self) -> None:
        model, active = self.model, self.active
        assert model.tasks == self.tasks[active]
        for (pool, name), digest in self.frozen.items():
            if pool == active:
                assert self.digest(name) == digest, f"task {name!r} of {pool!r} changed"
        expected = set()
        if self.open[active]:
            trained = ("sapt_A", "sapt_B", "sapt_key", "sapt_query_down", "sapt_query_up", "sapt_query_norm")
            names = [name for name, _ in model.named_parameters()]
            expected = {n for n in names if f".{active}." in n and any(f".{part}." in n for part in trained)}
            assert len(expected) == 2 * 2 + 5
        assert {n for n, p in model.named_parameters() if p.requires_grad} == expected


CALLS = [
    name for name, value in vars(Walk).items()
    if callable(value) and name not in ("__init__", "refused", "digest", "freeze", "check")
]  # fmt: skip


WAYS = st.lists(st.tuples(st.sampled_from(CALLS), st.integers(0, 5)), min_size=SHORTEST, max_size=LONGEST)


def random_walks(most: int) -> int:
    """Up to ``most`` walks, each checked after every call; how many there were."""
    walked = 0

    @settings(max_examples=most, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(WAYS)
    def walk(calls: list[tuple[str, int]]) -> None:
        nonlocal walked
        walked += 1
        model = Walk()
        for name, n in calls:
            getattr(model, name)(n)
            model.check()

    walk()
    return walked


@pytest.mark.slow
def test_a_hundred_random_walks() -> None:
    assert random_walks(100) >= 100


@pytest.mark.campaign
def test_five_hundred_random_walks() -> None:
    with campaign("walks") as counts:
        counts["walks"] += random_walks(500)
