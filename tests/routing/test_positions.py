"""Positions given by hand are no sign of packing; packed rows are known by positions that fall back, and no mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from helpers.gradients import packed
from helpers.tiny import build_pool, token_rows
from peft_sapt.routing.packing import segments_of

TASKS = ["a", "b", "c"]
IDS = torch.tensor(token_rows([9, 9], seed=1))
MASK = torch.ones_like(IDS)
POSITIONS = {
    "shared": [0, 0, 1, 2, 2, 2, 3, 4, 5],
    "two windows": [0, 1, 2, 0, 1, 2, 3, 4, 5],
    "backwards": [8, 7, 6, 5, 4, 3, 2, 1, 0],
    "constant": [0] * 9,
    "shifted": [4, 5, 6, 7, 8, 9, 10, 11, 12],
    "a tree": [0, 1, 2, 3, 3, 4, 4, 3, 4],
}


@pytest.mark.parametrize("router", ["attention", "ridge"])
@pytest.mark.parametrize("name", POSITIONS)
def test_one_prompt_whatever_its_positions(name: str, router: str) -> None:
    pool, positions = build_pool("llama", TASKS, router=router).eval(), torch.tensor([POSITIONS[name]] * 2)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "position_ids": positions}
    weights = pool.attention_weights(IDS, MASK)
    with torch.no_grad():
        expected = pool(**inputs, sapt_weights=weights).logits
        torch.testing.assert_close(pool(**inputs).logits, expected)
        torch.testing.assert_close(pool.generate(**inputs, max_new_tokens=2, do_sample=False)[:, :9], IDS)
    labels = IDS.masked_fill(torch.arange(9) < 5, -100)
    pool.train()
    if router == "attention":
        trained = pool(**inputs, labels=labels)
        mask = torch.arange(9).expand(2, 9) < 5
        marked = pool(**inputs, labels=labels, sapt_prompt_mask=mask)
        torch.testing.assert_close(trained.logits, marked.logits)


@pytest.mark.parametrize("name", ["shared", "two windows", "constant"])
def test_generation_without_a_mask_knows_that_a_row_is_one_prompt(name: str) -> None:
    pool, positions = build_pool("llama", TASKS).eval(), torch.tensor([POSITIONS[name]] * 2)
    settings = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = pool.generate(IDS, position_ids=positions, **settings).logits[0]
    weights = pool.attention_weights(IDS)
    expected = pool.generate(IDS, position_ids=positions, sapt_weights=weights, **settings).logits[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["shared", "constant", "shifted"])
def test_positions_that_never_fall_are_one_sample_without_a_mask_too(name: str) -> None:
    assert segments_of({"input_ids": IDS, "position_ids": torch.tensor([POSITIONS[name]] * 2)}) is None


def test_where_samples_start() -> None:
    ids = torch.ones(1, 9, dtype=torch.long)

    def starts(positions: list[int], **more: torch.Tensor) -> list[int] | None:
        found = segments_of({"input_ids": ids, "position_ids": torch.tensor([positions]), **more})
        return None if found is None else found[0].tolist()

    assert starts([0, 1, 2, 0, 1, 0, 1, 2, 3]) == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert starts([0, 1, 0, 0, 1, 2, 0, 0, 0]) == [0, 0, 1, 2, 2, 2, 3, 4, 5]  # samples of one token, and padding
    assert starts([0, 0, 1, 2, 2, 2, 0, 1, 1]) == [0, 1, 1, 1, 1, 1, 2, 2, 2]
    assert starts([0, 1, 2, 0, 1, 0, 1, 2, 3], attention_mask=torch.ones(1, 9)) is None


@pytest.mark.parametrize("how", ["position_ids", "seq_idx"])
def test_packed_rows_are_packed_still(how: str) -> None:
    pool, rows = build_pool("llama", TASKS).train(), token_rows([6, 9, 7], seed=4)
    batch = packed(rows, how)
    pool(**batch, use_cache=False)
    seen = torch.cat(pool.base_model.hooks.memory.seen("default"))
    assert len(seen) == len(rows)
    wide = {
        "input_ids": F.pad(batch["input_ids"], (0, 2), value=1),
        "labels": F.pad(batch["labels"], (0, 2), value=-100),
    }
    if how == "position_ids":
        pool(**wide, position_ids=F.pad(batch["position_ids"], (0, 2)), use_cache=False)
        assert len(torch.cat(pool.base_model.hooks.memory.seen("default"))) == 2 * len(rows)


def test_positions_in_four_axes_begin_with_those_of_text() -> None:
    """As Qwen-VL gives them: packed rows are told by the first axis, as in transformers."""
    rows = token_rows([6, 5], seed=4)
    ids = torch.tensor([[token for row in rows for token in row]])
    positions = torch.tensor([[i for row in rows for i in range(len(row))]])
    inputs = {"input_ids": ids, "position_ids": positions.expand(4, 1, -1)}
    assert torch.equal(segments_of(inputs), segments_of({"input_ids": ids, "position_ids": positions}))
    assert segments_of({**inputs, "attention_mask": torch.ones_like(ids)}) is None
