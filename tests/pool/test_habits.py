"""Random walks of habits, see helpers/habits.py: 100 with the slow tests, 400 others as a campaign."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers

from helpers.campaigns import campaign
from helpers.habits import HABITS, Walk
from helpers.habits_watch import ANSWERS, no_answers_read

LENGTH = 10  # habits of a walk
IN_CI, IN_CAMPAIGN = 100, 400


def walked(seeds: range) -> Counter[str]:
    """Take these walks; how often each habit came, and each refusal."""
    counts: Counter[str] = Counter()
    shown = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        for seed in seeds:
            walk = Walk(seed)
            walk.run(LENGTH)
            counts.update(step.split("(")[0] for step in walk.done)
            counts.update({f"refused with {name}": count for name, count in walk.refusals.items()})
    finally:
        transformers.logging.set_verbosity(shown)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("tens", range(IN_CI // 10))
def test_ten_walks(tens: int) -> None:
    assert (
        sum(count for name, count in walked(range(10 * tens, 10 * tens + 10)).items() if name in HABITS) == 10 * LENGTH
    )


@pytest.mark.campaign
def test_four_hundred_walks() -> None:
    with campaign("habits") as counts:
        found = walked(range(1000, 1000 + IN_CAMPAIGN))
        assert all(found[name] > IN_CAMPAIGN // 20 for name in HABITS), found
        counts.update({"walks": IN_CAMPAIGN, "habits taken": sum(found[name] for name in HABITS)})
        counts.update({name: count for name, count in found.items() if name not in HABITS})


def walk_with_an_old_task() -> Walk:
    walk = Walk(0)
    walk.own_loop(0)
    walk.add_task(0)
    walk.check()
    return walk


def changed_bytes(walk: Walk, patch: pytest.MonkeyPatch) -> None:
    next(value for key, value in walk.model.task_state("a").items() if "sapt_B" in key).add_(1e-3)
    walk.check()


def other_weights(walk: Walk, patch: pytest.MonkeyPatch) -> None:
    hooks = type(walk.model.base_model.hooks)
    compute = hooks.mixture_for

    def rolled(self, *args, **more):
        mixture = compute(self, *args, **more)
        mixture.weights = mixture.weights.roll(1, dims=1)
        return mixture

    patch.setattr(hooks, "mixture_for", rolled)
    walk.check()


def foreign_rows(walk: Walk, patch: pytest.MonkeyPatch) -> None:
    foreign = walk.model.pooled_prompts([{"input_ids": torch.tensor([[9, 9]])}])
    walk.subject.memory.set_replay("default", [foreign for _ in walk.model.tasks])
    walk.check()


def unmoved(walk: Walk, patch: pytest.MonkeyPatch) -> None:
    walk.trained(lambda: walk.model.commit_task([{"input_ids": torch.tensor([[9, 9]])}]), walk.model.current_task)


def answer_read(walk: Walk, patch: pytest.MonkeyPatch) -> None:
    with no_answers_read():
        walk.model.eval()(torch.tensor([[9, 9, ANSWERS]]))


FAULTS = {changed_bytes: "bytes of committed task 'a' changed", other_weights: "evaluation: ", unmoved: "never moved",
          foreign_rows: "are not of its own data", answer_read: "an answer token is in a query"}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_walk_sees_what_it_looks_for(fault, monkeypatch) -> None:
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        fault(walk_with_an_old_task(), monkeypatch)
