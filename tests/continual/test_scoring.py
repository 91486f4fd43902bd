"""Scores against the release's own, and decoding that is held to a task's labels."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from helpers.golden import FOLDER
from helpers.tiny import tiny_llama, tiny_t5
from helpers.words import tokenizer as make_tokenizer
from peft_sapt.continual.scoring import Labels, exact_match, label_set, normalised, rouge_l, warn_of_cut_answers
from peft_sapt.errors import StreamError


@pytest.mark.skipif(
    not (FOLDER / "rouge_pairs.json").exists(), reason=f"no golden fixtures at {FOLDER}: set PEFT_SAPT_GOLDEN"
)
def test_the_releases_scores_exactly() -> None:
    golden = json.loads((FOLDER / "rouge_pairs.json").read_text())
    pairs, score = golden["pairs"], rouge_l()
    assert len(pairs) == 200
    for pair in pairs:
        assert exact_match(pair["prediction"], [pair["reference"]]) == 100.0 * pair["exact_match"], pair
        assert score(pair["prediction"], [pair["reference"]]) == 100.0 * pair["rougeL"], pair
    exact = sum(exact_match(p["prediction"], [p["reference"]]) for p in pairs) / len(pairs)
    rouge = sum(score(p["prediction"], [p["reference"]]) for p in pairs) / len(pairs)
    assert round(exact, 4) == golden["overall"]["exact_match"]
    assert round(rouge, 4) == golden["overall"]["eval_rougeL"]


def test_the_best_of_several_references_counts() -> None:
    assert exact_match("Yes!", ["no", "yes"]) == 100.0 and exact_match("Yes!", ["no"]) == 0.0
    assert normalised("  The U.S.A.\tis-not ") == "the usa isnot"
    score = rouge_l()
    assert score("a b c d", ["x y", "a b c d e"]) == score("a b c d", ["a b c d e"]) > score("a b c d", ["x y"])


def rows(*answers: str | list[str], times: int = 4) -> list[dict]:
    return [{"output": a if isinstance(a, list) else [a]} for a in answers for _ in range(times)]


@pytest.mark.parametrize(
    ("splits", "labels"),
    [
        ({"train": rows("no", "yes"), "validation": []}, ["no", "yes"]),
        ({"train": rows("yes"), "validation": rows("no"), "test": rows("maybe")}, ["no", "yes"]),
        ({"train": rows("yes", "no", ["a", "b"]), "validation": []}, None),  # several references: free text
        ({"train": rows(*map(str, range(33))), "validation": []}, None),  # too many
        ({"train": rows("a", "b", times=3), "validation": []}, None),  # each hardly repeated
    ],
)
def test_what_counts_as_labels(splits, labels) -> None:
    assert label_set(splits) == labels


@pytest.mark.parametrize("make", [tiny_llama, tiny_t5], ids=["llama", "t5"])
def test_held_answers_are_greedy_among_the_labels(make) -> None:
    """Against a loop that looks at the logits itself; labels share beginnings, and one begins another."""
    torch.manual_seed(0)
    model, tokenizer = make().eval(), make_tokenizer()
    for name, parameter in model.named_parameters():
        if "EncDecAttention" in name or "lm_head" in name:
            parameter.data.mul_(8)  # so that rows differ
    names = ["w10 w11", "w10 w11 w12", "w10 w13", "w14", "w15 w16 w17"]
    labels = Labels(tokenizer, names, max_answer=6)
    assert len(labels.by_tokens) == len(names)
    t5 = model.config.is_encoder_decoder
    prompt = torch.randint(4, 40, (7, 5))
    skip = 1 if t5 else prompt.shape[1]
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False,
        pad_token_id=tokenizer.pad_token_id, prefix_allowed_tokens_fn=labels.allowed(skip),
    )[:, skip:]  # fmt: skip
    found = [labels.text(row) for row in out]
    assert set(found) <= set(names) and len(set(found)) > 1

    def by_hand(row: torch.Tensor) -> str:
        done: tuple[int, ...] = ()
        while done not in labels.by_tokens:
            if t5:
                start = [model.config.decoder_start_token_id, *done]
                logits = model(input_ids=row[None], decoder_input_ids=torch.tensor([start])).logits[0, -1]
            else:
                logits = model(torch.cat([row, torch.tensor(done, dtype=torch.long)])[None]).logits[0, -1]
            going = {path[len(done)] for path in labels.by_tokens if path[: len(done)] == done}
            done = (*done, max(going, key=lambda token: float(logits[token])))
        return labels.by_tokens[done]

    with torch.no_grad():
        assert found == [by_hand(row) for row in prompt]


def test_labels_that_a_cut_makes_alike_are_refused_and_cut_answers_are_told() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(StreamError, match=r"'w10 w11 w12' and 'w10 w11 w13' are the same in their first 2 tokens"):
        Labels(tokenizer, ["w10 w11 w12", "w10 w11 w13"], max_answer=3)
    assert Labels(tokenizer, ["w10", "w10 "], max_answer=9).text(torch.tensor([10, 2])) == "w10", (
        "no cut makes these so"
    )
    rows = [{"output": [text]} for text in ("w10", "w10 w11", "w10 w11 w12")]
    with pytest.warns(UserWarning, match=r"1 of 3 answers of task 'a' are cut to 2 tokens, as 'w10 w11 w12'"):
        warn_of_cut_answers(tokenizer, "a", rows, max_answer=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_cut_answers(tokenizer, "a", rows, max_answer=4)
