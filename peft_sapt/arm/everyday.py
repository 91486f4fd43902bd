"""Prompts that belong to no task, in the forms in which users type them: what a pool leaves to its base model.

The prompts are ours, written by hand: small talk, questions, sums, code, a dozen languages. Each comes bare, in what
all prompts of a task end with ("Output:", say), and in the tokenizer's chat template, with and without an instruction.
A task's own prompts are put into that template too: what is asked tells a task, not how it is written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pool import lifecycle
from ..pool.view import Pool
from ..routing.hidden import longest_prompt
from ..routing.statistics import GIVEN
from .progress import counted

LONGEST = 64  # tokens of a prompt
BATCH = 32
INSTRUCTIONS = (
    "You are a helpful assistant.",
    "Be concise.",
    "Think step by step and explain your reasoning.",
    "You are an expert. Give accurate answers and say so when you do not know.",
    "Always answer in a friendly and polite tone.",
    "Reply with a single word or number where you can.",
    "You help people with their work. Keep it short.",
    "Respond in the language of the question, in at most three sentences.",
)
ENDS_TEXT = ".!?"
MARK = "\u2063"  # an invisible separator, which no template contains


@dataclass(frozen=True)
class Form:
    """What stands ``before`` and ``after`` a prompt, as token ids."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def around(self, ids: list[int]) -> list[int]:
        return self.with_whole(ids[:LONGEST])

    def with_whole(self, ids: list[int]) -> list[int]:
        return [*self.before, *ids, *self.after]


@lru_cache(maxsize=1)
def everyday_prompts() -> tuple[str, ...]:
    """Some hundred prompts of many kinds."""
    return tuple((Path(__file__).parent / "everyday.txt").read_text(encoding="utf-8").splitlines())


def forms_of(tokenizer: Any, prompts: list[list[int]]) -> list[tuple[Form, ...]]:
    """The forms that everyday prompts may come in, beside a task with these ``prompts`` (token ids): each a few of a
    kind, which take turns."""
    bare, chat = special_tokens_around(tokenizer), chat_form(tokenizer)
    found: list[tuple[Form, ...]] = [(bare,)]
    if chat is not None:
        found += [(chat,), instructed_forms(tokenizer)]
    after = without_full_stop(tokenizer, common_end(prompts))
    if after and (chat is None or after != chat.after):
        found.append((Form(bare.before, after),))
    return [forms for forms in dict.fromkeys(found) if forms]


def renderings_of(tokenizer: Any, prompts: list[list[int]], templates: Sequence[str] | str) -> list[list[int]]:
    """Each of a task's ``prompts`` (token ids) once more, as ``templates`` in turns render it.

    Args:
        templates: texts with ``{}`` for the prompt; or "chat", for the tokenizer's chat template with and without an
            instruction to the system, if it has one and the prompts are in none yet.
    """
    if templates == "chat":
        chat = chat_form(tokenizer)
        known = chat is None or any(tuple(p[-len(chat.after) :]) == chat.after for p in prompts if chat.after)
        others = instructed_forms(tokenizer) or (chat,)  # a template may drop what is for the system
        forms = [] if chat is None or known else [f for form in others if form is not None for f in (chat, form)]
    else:
        forms = [Form(*(tuple(ids_of(tokenizer, part)) for part in text.split("{}"))) for text in templates]
    return [forms[i % len(forms)].with_whole(prompt) for i, prompt in enumerate(prompts)] if forms else []


def fitting(pool: Pool, rows: list[list[int]]) -> list[list[int]]:
    """Those of ``rows`` that the base model has positions for, cut at the end if none is short enough."""
    limit = longest_prompt(pool.base)
    if limit is None or not rows:
        return rows
    return [row for row in rows if len(row) <= limit] or [row[:limit] for row in rows]


def special_tokens_around(tokenizer: Any) -> Form:
    """What the tokenizer itself puts around a text, such as a start token."""
    plain = ids_of(tokenizer, "a")
    whole = list(tokenizer("a").input_ids)
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return Form(tuple(whole[:start]), tuple(whole[start + len(plain) :]))


def chat_form(tokenizer: Any, instruction: str | None = None) -> Form | None:
    """The chat template around one message of a user, perhaps behind an ``instruction`` to the system; None if the
    tokenizer has none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [] if instruction is None else [{"role": "system", "content": instruction}]
    messages.append({"role": "user", "content": MARK})
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception:  # a template raises what it likes, as for a role that it does not know
        return None
    if text.count(MARK) != 1:
        return None
    before, after = text.split(MARK)
    return Form(tuple(ids_of(tokenizer, before)), tuple(ids_of(tokenizer, after)))


def instructed_forms(tokenizer: Any) -> tuple[Form, ...]:
    """The chat template behind each of some instructions to the system; none if it takes none."""
    forms = (chat_form(tokenizer, text) for text in INSTRUCTIONS)
    plain = chat_form(tokenizer)  # a template may drop what is for the system
    return tuple(form for form in forms if form is not None and form != plain)


def common_end(prompts: list[list[int]]) -> tuple[int, ...]:
    """Tokens that all of ``prompts`` end with, if they are not all the same."""
    different = {tuple(prompt) for prompt in prompts}
    if len(different) < 2:
        return ()
    common: list[int] = []
    for column in zip(*(reversed(prompt) for prompt in different), strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return tuple(reversed(common[:LONGEST]))


def without_full_stop(tokenizer: Any, end: tuple[int, ...]) -> tuple[int, ...]:
    """``end`` without the punctuation that ends the texts before it, all of which may be statements."""
    start = next((i for i, token in enumerate(end) if tokenizer.decode([token]).strip(ENDS_TEXT + " ")), len(end))
    lines = next((i for i, token in enumerate(end) if "\n" in tokenizer.decode([token])), start)
    return end[min(start, lines) :]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def show_everyday_prompts(pool: Pool, tokenizer: Any, prompts: list[list[int]]) -> None:
    """Let ``pool`` know everyday prompts in every form that a task with these ``prompts`` adds, if it wants any."""
    config, statistics = pool.config, pool.statistics
    if config.fallback is None or not config.statistics_rank:
        return
    if GIVEN in config.background_forms:  # a user's own take their place
        return
    known = [Form(tuple(before), tuple(after)) for before, after in config.background_forms]
    new = [forms for forms in forms_of(tokenizer, prompts) if forms[0] not in known]
    if not new:
        return
    texts = [ids for text in everyday_prompts() if (ids := ids_of(tokenizer, text))]
    rows = [*statistics.background(pool.adapter), *(pooled_in(pool, forms, texts) for forms in new)]
    pool.memory.show_own_config(pool.adapter).background_forms = [
        [list(form.before), list(form.after)] for form in [*known, *(forms[0] for forms in new)]
    ]
    lifecycle.set_background(pool, rows)


def pooled_in(pool: Pool, forms: Sequence[Form], texts: list[list[int]]) -> Tensor:
    """Features [n, d] of ``texts``, in ``forms`` that take turns."""
    rows = fitting(pool, [forms[i % len(forms)].around(ids) for i, ids in enumerate(texts)])
    return pooled_rows(pool, rows, "reading everyday prompts")


def pooled_rows(pool: Pool, rows: list[list[int]], what: str = "reading prompts") -> Tensor:
    """Features [n, d] of prompts given by their tokens, those of like length together, which pads least."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    starts = counted(range(0, len(rows), BATCH), f"{what}, batches of {BATCH}", -(-len(rows) // BATCH))
    found = pool.pooled_prompts(batch_of([rows[i] for i in order[k : k + BATCH]]) for k in starts)
    return torch.empty_like(found).index_copy_(0, torch.tensor(order, device=found.device, dtype=torch.long), found)


def batch_of(rows: list[list[int]]) -> dict[str, Tensor]:
    """Rows of token ids, padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])}
