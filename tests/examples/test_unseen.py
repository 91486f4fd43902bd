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
    kinds = [asked[i * len(asked) // 5] for i in range(5)]  # base, mixture, its leader, two blocks: as many forwards
    assert kinds[0] is None
    torch.testing.assert_close(kinds[1], torch.tensor(list(found["weights"].values())), atol=1e-5, rtol=0)
    lead = max(found["weights"], key=found["weights"].get)
    assert kinds[2].tolist() == [float(lead == "first"), float(lead == "second")]
    assert kinds[3].tolist() == [1, 0] and kinds[4].tolist() == [0, 1]
    config = model.base_model.pool.config
    assert config.top_k is None and not config.renormalize, "put back"
