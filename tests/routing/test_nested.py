"""Another prompt that is asked while one is answered has weights of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from helpers.tiny import PAD, build_pool, padded, token_rows

TASKS = ["a", "b", "c"]
OUTER, INNER = padded(token_rows([8, 6], seed=1)), padded(token_rows([7, 5, 9], seed=4))


class Asking(BaseStreamer):
    """Asks the model something else at each step, wherever generate calls it."""

    def __init__(self, ask: Callable[[], torch.Tensor]) -> None:
        self.ask, self.found = ask, []

    def put(self, value: torch.Tensor) -> None:
        self.found.append(self.ask())

    def end(self) -> None:
        pass


class AskingProcessor(Asking, LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.put(input_ids)
        return scores


class AskingCriteria(Asking, StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **more: Any) -> torch.Tensor:
        self.put(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def pool_of(family: str, block: str):
    return build_pool(family, TASKS, block=block, **({"num_virtual_tokens": 4} if block == "prompt" else {})).eval()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("where", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("how", ["forward", "generate"])
@pytest.mark.parametrize("family, block", [("llama", "lora"), ("llama", "prompt"), ("t5", "lora")])
def test_another_prompt_in_between(family: str, block: str, how: str, where: str, use_cache: bool) -> None:
    model = pool_of(family, block)
    extra = {"decoder_input_ids": torch.full((3, 1), PAD)} if family == "t5" else {}
    settings = {"max_new_tokens": 3, "do_sample": False}

    def ask() -> torch.Tensor:
        with torch.no_grad():
            if how == "forward":
                return model(**INNER, **extra).logits
            return model.generate(**INNER, **settings)

    expected, outer = ask(), model.generate(**OUTER, **settings, use_cache=use_cache)
    asking = AskingProcessor(ask) if where == "logits_processor" else AskingCriteria(ask)
    given = LogitsProcessorList([asking]) if where == "logits_processor" else [asking]
    found = model.generate(**OUTER, **settings, use_cache=use_cache, **{where: given})
    assert len(asking.found) > 1
    for answer in asking.found:
        torch.testing.assert_close(answer, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found, outer)


def test_in_a_streamer() -> None:
    model = pool_of("llama", "lora")
    prompt, other = torch.tensor(token_rows([8], seed=1)), torch.tensor(token_rows([7], seed=4))
    with torch.no_grad():
        expected = model(other).logits
    asking = Asking(lambda: model(other).logits)
    model.generate(prompt, max_new_tokens=3, streamer=asking)
    for answer in asking.found:  # the first comes before the first forward
        torch.testing.assert_close(answer, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("given", [{"sapt_task": "b"}, {"sapt_weights": [0.2, 0.5, 0.3]}])
def test_what_is_given_to_the_inner_one_holds(given: dict[str, Any]) -> None:
    model = pool_of("llama", "lora")
    with torch.no_grad():
        expected = model(**INNER, **given).logits
    asking = AskingProcessor(lambda: model(**INNER, **given).logits)
    model.generate(**OUTER, max_new_tokens=3, logits_processor=LogitsProcessorList([asking]))
    torch.testing.assert_close(asking.found[-1], expected)
