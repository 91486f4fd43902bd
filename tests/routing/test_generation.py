"""Ways to generate beyond those of test_rows_alone: each equals greedy decoding with the prompt's weights."""

from __future__ import annotations

import pytest
import torch
from transformers import pipeline

from helpers.tiny import assert_real_pool, build_pool, padded, tiny_llama, token_rows, watch_weights
from helpers.words import tokenizer
from helpers.zoo import pool_of

ROWS = token_rows([5, 9, 3, 12])
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def alone(model, row: list[int], **kwargs) -> list[int]:
    """Greedy tokens of one row, without a cache."""
    return model.generate(**padded([row]), use_cache=False, **GREEDY, **kwargs)[0, -5:].tolist()


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma", "GPT-2", "BART"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_left_padded_batch_equals_single_rows(name, beams) -> None:
    model = pool_of(name)
    assert_real_pool(model.attention_weights(**padded(ROWS)))
    found = model.generate(**padded(ROWS), **GREEDY, num_beams=beams)
    for i, row in enumerate(ROWS):
        assert found[i, -5:].tolist() == alone(model, row, num_beams=beams)


def test_assisted_decoding() -> None:
    model = build_pool("llama", ["a", "b", "c"]).eval()
    torch.manual_seed(1)
    assistant = tiny_llama(32).eval()
    for row in ROWS:
        found = model.generate(**padded([row]), **GREEDY, assistant_model=assistant)
        assert found[0, -5:].tolist() == alone(model, row)


def test_inputs_embeds() -> None:
    model = build_pool("llama", ["a", "b", "c"]).eval()
    batch = padded(ROWS)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    found = model.generate(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], **GREEDY)
    assert found.tolist() == [alone(model, row) for row in ROWS]


def test_sampling_repeats_with_its_seed(pool) -> None:
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": True, "top_k": 50, "num_return_sequences": 2}
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(pool.generate(**padded(ROWS), **settings))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    seen = []
    layer = next(m for m in pool.modules() if hasattr(m, "sapt_A"))
    (handle,) = watch_weights([layer], seen)
    pool.generate(**padded(ROWS), **settings)
    handle.remove()
    single = torch.cat([pool.attention_weights(**padded([row])) for row in ROWS])
    torch.testing.assert_close(seen[-1], single.repeat_interleave(seen[-1].shape[0] // 4, dim=0), atol=1e-6, rtol=0)


def test_the_pipeline_and_chat_templates() -> None:
    """A system prompt is part of the query unless sapt_prompt_mask leaves it out."""
    model, words = build_pool("llama", ["a", "b", "c"]).eval(), tokenizer()
    words.chat_template = (
        "{% for m in messages %}{{ 'w90 ' if m.role == 'system' else 'w91 ' }}{{ m.content }} {% endfor %}"
    )
    chat = [{"role": "system", "content": "w40 w41 w42"}, {"role": "user", "content": "w10 w11 w12"}]
    generate = pipeline("text-generation", model=model, tokenizer=words, device="cpu")
    answer = generate(chat, **GREEDY, return_full_text=False)[0]["generated_text"]
    prompt = words.apply_chat_template(chat, return_tensors="pt", return_dict=True)
    prompt = {k: prompt[k] for k in ("input_ids", "attention_mask")}
    expected = model.generate(**prompt, **GREEDY)[0, -5:]
    assert words.decode(expected, skip_special_tokens=True).split() == answer.split()
    user = torch.zeros_like(prompt["input_ids"], dtype=torch.bool)
    user[:, 4:] = True
    whole, part = (model.attention_weights(**prompt, sapt_prompt_mask=m) for m in (None, user))
    assert not torch.allclose(whole, part, atol=1e-3)
    torch.testing.assert_close(
        model.generate(**prompt, sapt_prompt_mask=user, **GREEDY),
        model.generate(**prompt, sapt_weights=part, **GREEDY),
    )
    named = generate("w10 w11", sapt_task="b", **GREEDY, return_full_text=False)[0]["generated_text"]
    ids = words("w10 w11", return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**ids, sapt_task="b", **GREEDY)[0, -5:]
    assert words.decode(expected, skip_special_tokens=True).split() == named.split()
