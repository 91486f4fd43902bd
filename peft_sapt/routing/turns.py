"""Chats of several turns: the query ends where the first answer begins, in training and in inference alike.

In training the labels tell where that is. At inference a chat is one prompt, earlier answers included, and only the
tokens that begin each answer tell (``SaptConfig.answer_header``, a chat template's assistant header).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PromptError

LONGEST_HEADER = 16  # tokens, of a suggested one


def until_first_answer(mask: Tensor, input_ids: Tensor | None, segments: Tensor | None, header: list[int]) -> Tensor:
    """``mask`` [B, S] cut behind the first ``header`` of each row, or of each sample of packed rows.

    Raises:
        PromptError: there are no token ids to find it in.
    """
    if input_ids is None:
        raise PromptError(
            "SaptConfig.answer_header is looked for in input_ids, and only inputs_embeds are given: pass "
            "sapt_prompt_mask=[B, S]."
        )
    ends = (_ends_of(header, input_ids) & mask).long()  # [B, S]
    if segments is None:
        return mask & (ends.cumsum(dim=1) - ends == 0)
    flat, seen = segments.flatten(), ends.flatten().cumsum(0) - ends.flatten()  # headers before each token
    earlier = torch.full((int(flat.max()) + 1,), len(seen), device=seen.device).scatter_reduce(0, flat, seen, "amin")
    return mask & (seen == earlier[flat]).view_as(mask)


def _ends_of(header: list[int], input_ids: Tensor) -> Tensor:
    """True where a ``header`` ends, [B, S]."""
    found = torch.zeros_like(input_ids, dtype=torch.bool)
    length = len(header)
    if length <= input_ids.shape[1]:
        wanted = torch.tensor(header, device=input_ids.device)
        found[:, length - 1 :] = (input_ids.unfold(1, length, 1) == wanted).all(dim=-1)
    return found


def refuse_turns(mask: Tensor, supervised: Tensor, input_ids: Tensor | None) -> None:
    """Refuse rows [B, S] with several answers, each behind the same tokens: at inference all would be in the query.

    Raises:
        PromptError: it names these tokens, which ``SaptConfig.answer_header`` takes.
    """
    if input_ids is None:
        return
    before = torch.nn.functional.pad(supervised[:, :-1], (1, 0))
    starts, ends = supervised & ~before & mask, before & ~supervised & mask  # [B, S]: an answer begins, or has ended
    several = starts.sum(dim=1) > 1
    if not bool(several.any()):
        return
    contexts, gaps = [], []
    for row in several.nonzero().flatten().tolist():
        begins, after = (marks[row].nonzero().flatten().tolist() for marks in (starts, ends))
        contexts += [input_ids[row, :begin].tolist() for begin in begins]
        gaps += [
            (input_ids[row, end:begin].tolist(), input_ids[row, :2].tolist())
            for end, begin in zip(after, begins[1:], strict=False)
        ]
    header = _common_end(contexts)
    # a turn is longer than a masked token or two, and where its header is a single token it begins as the row does
    turns = all(len(gap) > max(2, len(header)) and (len(header) > 1 or gap[0] in first) for gap, first in gaps)
    if not turns:
        return
    if header:
        raise PromptError(
            f"Rows {several.nonzero().flatten().tolist()[:10]} have several answers, each behind the tokens {header}. "
            "Training would take the tokens before the first one as the query, inference all of a chat. Set "
            f"SaptConfig(answer_header={header}) (of a pool at hand, model.peft_config[name].answer_header), so that "
            "the query ends there in both; or mark it with sapt_prompt_mask=[B, S]."
        )


def _common_end(rows: list[list[int]]) -> list[int]:
    common: list[int] = []
    for column in zip(*(reversed(row[-LONGEST_HEADER:]) for row in rows), strict=False):
        if len(set(column)) > 1:
            break
        common.insert(0, column[0])
    return common
