"""Chats of several turns: training and inference read the same tokens."""

from __future__ import annotations

import pytest
import torch

from helpers.tiny import build_pool, padded, token_rows
from helpers.words import tokenizer
from peft_sapt import ArmCallback, PromptMaskCollator, SaptConfig
from peft_sapt.errors import PromptError, SaptError

TASKS = ["a", "b", "c"]
USER, ASSISTANT, END = [6, 7], [6, 8, 9], [5]  # headers and end of a turn, as in a chat template


def chat(turns: int, seed: int, system: bool = False) -> tuple[list[int], list[int], int]:
    """Tokens, labels on the answers alone, and how many tokens lead up to the first answer."""
    ids, labels, first = ([6, 10, 20, 21, 5], [-100] * 5, 0) if system else ([], [], 0)
    for turn in range(turns):
        said, answer = token_rows([4 + turn, 3], seed=10 * seed + turn)
        head = [*USER, *(t + 12 if t < 12 else t for t in said), *END, *ASSISTANT]
        body = [*(t + 12 if t < 12 else t for t in answer), *END]
        ids, labels = ids + head, labels + [-100] * len(head)
        first = first or len(ids)
        ids, labels = ids + body, labels + body
    return ids, labels, first


def batch_of(chats: list[tuple[list[int], list[int], int]]) -> dict[str, torch.Tensor]:
    batch = padded([ids for ids, _, _ in chats], "right")
    width = batch["input_ids"].shape[1]
    batch["labels"] = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels, _ in chats])
    return batch


CHATS = [chat(3, seed=1), chat(3, seed=2, system=True), chat(2, seed=3), chat(1, seed=4)]


def queries(model, call) -> torch.Tensor:
    """What the router is asked while ``call`` runs."""
    found, router = [], model.base_model.router
    attend = type(router).attend
    router.attend = lambda adapter, pooled, *more: (found.append(pooled), attend(router, adapter, pooled, *more))[1]
    try:
        call()
    finally:
        del router.attend
    return torch.cat(found)


@pytest.mark.parametrize("router", ["attention", "ridge"])
@pytest.mark.parametrize("block", ["lora", "prompt"])
def test_training_evaluation_and_inference_read_the_same_tokens(block: str, router: str) -> None:
    """A row at a time at inference: each turn of a chat as one prompt, and its answer left open."""
    model = build_pool("llama", TASKS, block=block, router=router, answer_header=ASSISTANT)
    expected = model.pooled_prompts([{"input_ids": torch.tensor([ids[:first]])} for ids, _, first in CHATS])
    batch = batch_of(CHATS)
    if router == "attention":
        torch.testing.assert_close(queries(model.train(), lambda: model(**batch)), expected)
    model.eval()
    torch.testing.assert_close(queries(model, lambda: model(**batch)), expected)
    for (ids, labels, _), wanted in zip(CHATS, expected, strict=True):
        ends = [i for i in range(1, len(ids)) if labels[i] != -100 and labels[i - 1] == -100]
        for end in ends:  # the prompt of each turn
            prompt = torch.tensor([ids[:end]])
            torch.testing.assert_close(queries(model, lambda p=prompt: model(p)), wanted[None])
            asked = queries(model, lambda p=prompt: model.generate(p, max_new_tokens=2, do_sample=False))
            torch.testing.assert_close(asked, wanted[None])
    torch.testing.assert_close(model.attention_weights(**{k: batch[k] for k in ("input_ids", "attention_mask")}),
                               model.base_model.router.attend("default", expected))  # fmt: skip
    arm = ArmCallback(tokenizer(), replay="rows")
    arm.take_batches(model.base_model.pool, [batch])
    torch.testing.assert_close(arm.pooled, expected)
    assert arm.prompts == [ids[:first] for ids, _, first in CHATS]


def test_packed_chats() -> None:
    model = build_pool("llama", TASKS, answer_header=ASSISTANT).train()
    flat = {
        "input_ids": torch.tensor([[t for ids, _, _ in CHATS for t in ids]]),
        "labels": torch.tensor([[t for _, labels, _ in CHATS for t in labels]]),
        "position_ids": torch.tensor([[i for ids, _, _ in CHATS for i in range(len(ids))]]),
    }
    expected = model.pooled_prompts([{"input_ids": torch.tensor([ids[:first]])} for ids, _, first in CHATS])
    torch.testing.assert_close(queries(model, lambda: model(**flat, use_cache=False)), expected)
    del flat["labels"]
    torch.testing.assert_close(queries(model.eval(), lambda: model(**flat, use_cache=False)), expected)


@pytest.mark.parametrize("router", ["attention", "ridge"])
def test_without_the_header_several_answers_are_refused_by_name(router: str) -> None:
    model, batch = build_pool("llama", TASKS, router=router), batch_of(CHATS)
    wanted = rf"Rows \[0, 1, 2\] have several answers.*tokens \[{', '.join(map(str, [*END, *ASSISTANT]))}\]"
    for call in (lambda: model.train()(**batch), lambda: model.eval()(**batch), lambda: model.pooled_prompts([batch])):
        with pytest.raises(PromptError, match=wanted):
            call()
    model.peft_config["default"].answer_header = [*END, *ASSISTANT]  # as the message says
    weights = queries(model, lambda: model(**batch))
    expected = model.pooled_prompts([{"input_ids": torch.tensor([ids[:first]])} for ids, _, first in CHATS])
    torch.testing.assert_close(weights, expected)


def test_a_prompt_mask_says_it_too_and_gaps_of_another_kind_are_let_through() -> None:
    model, batch = build_pool("llama", TASKS).eval(), batch_of(CHATS)
    mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, (_, _, first) in zip(mask, CHATS, strict=True):
        row[:first] = True
    model(**batch, sapt_prompt_mask=mask)
    model(**PromptMaskCollator(lambda rows: batch)([{"sapt_prompt_mask": m.tolist()} for m in mask][:0] or [{}] * 4))
    ids = torch.tensor(token_rows([12]))
    labels = ids.clone()
    labels[:, [0, 1, 5]] = -100  # a token that somebody masked
    labels[0, 8] = -100
    model(input_ids=ids, labels=labels)


def test_the_field() -> None:
    for wrong in ([], "assistant", [1.5], [-1], 7):
        with pytest.raises(SaptError, match=r"SaptConfig\.answer_header must be a non-empty list of token ids"):
            SaptConfig(answer_header=wrong)
    model = build_pool("llama", TASKS, answer_header=ASSISTANT).eval()
    embeddings = model.get_input_embeddings()(torch.tensor([CHATS[0][0]]))
    with pytest.raises(PromptError, match=r"answer_header is looked for in input_ids"):
        model(inputs_embeds=embeddings)


def test_it_is_saved(tmp_path) -> None:
    build_pool("llama", TASKS, answer_header=ASSISTANT).save_pretrained(tmp_path)
    assert SaptConfig.from_pretrained(tmp_path).answer_header == ASSISTANT


NEWLINE = 50


@pytest.mark.parametrize("ids, masked", [
    ([5, 6, 7, NEWLINE, 20, 21, 22, 40, 41, NEWLINE, 23, 24, 2], [0, 1, 2, 3, 7, 8, 9]),  # a tool's output
    ([5, 6, 7, 2, 20, 21, 2, 22, 23, 2], [0, 1, 2, 3, 6, 9]),  # end tokens within an answer
    ([5, 6, 9, 20, 9, 21, 22, 9, 23], [0, 1, 2, 4, 7]),  # single masked tokens
    ([5, 6, 7, NEWLINE, 20, NEWLINE, 21], [0, 1, 2, 3, 5]),  # two slots
])  # fmt: skip
def test_gaps_in_an_answer_are_no_turns(ids: list[int], masked: list[int]) -> None:
    model = build_pool("llama", TASKS).eval()
    labels = torch.tensor([[-100 if i in masked else token for i, token in enumerate(ids)]])
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), labels=labels)


def test_a_header_of_one_token() -> None:
    """[INST] question [/INST] answer, twice: the turn begins as the row does."""
    ids = [3, 6, 30, 31, 7, 40, 41, 2, 6, 32, 33, 34, 7, 42, 2]
    labels = [-100] * 5 + [40, 41, 2] + [-100] * 5 + [42, 2]
    model = build_pool("llama", TASKS)
    with pytest.raises(PromptError, match=r"behind the tokens \[7\]"):
        model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))


def test_an_encoder_has_no_answers() -> None:
    with pytest.raises(SaptError, match="answer_header is for decoders"):
        SaptConfig(task_type="SEQ_2_SEQ_LM", answer_header=[5])
