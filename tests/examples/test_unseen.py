"""Tasks outside the pool: which weights answer them."""

from __future__ import annotations

import pytest
import torch
import unseen as subject
from unseen import score_unseen

from helpers.bench import tiny_bench
from peft_sapt.continual.sapt import Recipe, learn_pool


def test_each_score_comes_from_its_own_weights(tmp_path, monkeypatch) -> None:
    bench = tiny_bench(tmp_path)
    model, _, _ = learn_pool(bench, Recipe(config={"router": "ridge", "fallback": None}))
    bench.stream["other"] = {"test": [{"instruction": "", "input": "i j k l", "output": ["i"]}] * 3}
    asked, evaluate = [], subject.evaluate

    def spying(bench, model, names, split=None, **kwargs):
        hook = model.base_model.model.model.layers[-1].self_attn.q_proj.register_forward_hook(
            lambda module, args, output: asked.append(
                None if module.disable_adapters else module.forward_state.weights[0]
            )
        )
        try:
            return evaluate(bench, model, names, split, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(subject, "evaluate", spying)
    found = score_unseen(bench, model, ["other"])["other"]
    assert set(found["blocks"]) == {"first", "second"} and sum(found["weights"].values()) == pytest.approx(1)
    kinds = [asked[i * len(asked) // 4] for i in range(4)]  # base, mixture, two blocks: as many forwards each
    assert kinds[0] is None
    torch.testing.assert_close(kinds[1], torch.tensor(list(found["weights"].values())), atol=1e-5, rtol=0)
    assert kinds[2].tolist() == [1, 0] and kinds[3].tolist() == [0, 1]
