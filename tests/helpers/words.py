"""Three tasks over overlapping vocabularies for the tiny models: a tokenizer of one word a token, rows and batches."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.tiny import PAD, padded

TASKS = ["a", "b", "c"]

MARKS = {"a": range(10, 30), "b": range(27, 50), "c": range(47, 70)}  # overlapping vocabularies


def tokenizer() -> PreTrainedTokenizerFast:
    """One word per token id; 'w17' is token 17."""
    words = {f"w{i}": i for i in range(100)}
    words = {"<bos>": 3, "<eos>": 2, "<pad>": PAD, "<unk>": 0} | {w: i for w, i in words.items() if i > 3}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def rows_of(task: str, count: int = 60, seed: int = 0) -> list[dict[str, list[int]]]:
    """Prompts of five to nine tokens from the task's vocabulary, closed by token 5; the answer is one token."""
    rng = torch.Generator().manual_seed(seed + ord(task))
    words = torch.tensor(list(MARKS[task]))
    rows = []
    for _ in range(count):
        length = int(torch.randint(5, 10, (1,), generator=rng))
        prompt = [*words[torch.randint(len(words), (length,), generator=rng)].tolist(), 5]
        answer = 70 + ord(task) - ord("a") + 3 * (prompt[0] % 2)
        rows.append({"input_ids": [*prompt, answer], "labels": [-100] * len(prompt) + [answer]})
    return rows


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    batch = padded([row["input_ids"] for row in rows], "right")
    width = batch["input_ids"].shape[1]
    batch["labels"] = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows])
    return batch


def prompts_of(task: str, seed: int) -> dict[str, torch.Tensor]:
    return padded([row["input_ids"][:-1] for row in rows_of(task, seed=seed)])
