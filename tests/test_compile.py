"""torch.compile: the same numbers, one graph for every selection of tasks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo as dynamo

from helpers.gradients import ROWS, assert_same, batch_of, gradients_of
from helpers.tiny import build_pool

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler():
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()


def graphs() -> int:
    return int(dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(("family", "backend"), [("llama", "inductor"), ("t5", "aot_eager")])
def test_gradients_and_selections_under_compile(family, backend) -> None:
    model = build_pool(family, ["a", "b", "c"]).train()
    batch = {**batch_of(ROWS, family == "t5"), "use_cache": False}
    plain = gradients_of(model, lambda: model(**batch).loss)
    compiled = torch.compile(model, backend=backend)
    assert_same(gradients_of(model, lambda: compiled(**batch).loss), plain)
    model.eval()
    choices = [
        {},
        {"sapt_task": "a"},
        {"sapt_task": "c"},
        {"sapt_weights": [0.2, 0.3, 0.5]},
        {"sapt_task": ["a", "b", "a", "c"]},
    ]
    with torch.no_grad():
        compiled(**batch)
        known = graphs()
        for choice in choices:
            expected = copy.deepcopy(model)(**batch, **choice).logits
            torch.testing.assert_close(compiled(**batch, **choice).logits, expected, atol=1e-5, rtol=1e-4)
    assert graphs() == known, "a change of the selection must not compile anew"
