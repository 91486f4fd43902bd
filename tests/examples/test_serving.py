"""What the serving examples do with a pool: answers, masks, conversations, and exact LoRAs for a LoRA server."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import chat
import pytest
import serve_vllm
import torch
from peft import PeftModel
from serving import Served, example_prompts
from transformers import AutoModelForCausalLM

from helpers.served_pool import TASKS, prompt_of, save_pool
from peft_sapt.errors import SaptError


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    return save_pool(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def served(pool: Path) -> Served:
    return Served(pool)


def greedy(served: Served, model, prompt: str) -> str:
    inputs = served.encode(prompt)
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return served.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_it_answers_as_the_pool_does(served: Served) -> None:
    for name in TASKS:
        weights = served.weights(prompt_of(name))
        assert max(weights, key=lambda task: weights[task]) == name and sum(weights.values()) == pytest.approx(1)
        inputs = served.encode(prompt_of(name))
        expected = served.model.generate(**inputs, max_new_tokens=8, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        answer = served.answer(prompt_of(name), weights, 8)
        assert (
            answer.text == served.tokenizer.decode(expected, skip_special_tokens=True).strip() and answer.seconds > 0
        )


def test_a_masked_task_gives_its_share_to_the_others(served: Served) -> None:
    whole, part = served.weights(prompt_of("a")), served.weights(prompt_of("a"), ["b", "c"])
    assert part["a"] == 0 and part["b"] / part["c"] == pytest.approx(whole["b"] / whole["c"])
    with pytest.raises(SaptError, match="tick at least one"):
        served.weights(prompt_of("a"), [])
    with pytest.raises(SaptError, match="empty"):
        served.answer("  ", whole)


def test_without_weights_the_base_model_answers(served: Served) -> None:
    base = AutoModelForCausalLM.from_pretrained(served.model.base_model.model.name_or_path)
    found = served.answer(prompt_of("a"), None, 8)
    assert found.text == greedy(served, base, prompt_of("a")) and not found.weights


def test_what_cannot_be_served_says_so(tmp_path, pool) -> None:
    with pytest.raises(SaptError, match=r"holds no pool"):
        Served(tmp_path)
    config = json.loads((pool / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(SaptError, match="names no base model"):
        Served(tmp_path)
    assert example_prompts(pool) == [prompt_of(name) for name in TASKS] and example_prompts(tmp_path) == []


# --- chat -----------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ 'w90 ' + m.content + ' ' }}{% endfor %}{% if add_generation_prompt %}w91 {% endif %}"
)


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_a_conversation_keeps_the_weights_of_its_first_turn(pool: Path, template) -> None:
    served = Served(pool)
    served.tokenizer.chat_template = template
    talk = chat.Conversation(served, 4, turns="first")
    talk.say(prompt_of("a"))
    first, weights = talk.text(talk.turns), dict(talk.weights)
    assert max(weights, key=lambda name: weights[name]) == "a"
    talk.say(prompt_of("b"))
    assert talk.weights == weights and len(talk.turns) == 4 and talk.text(talk.turns).startswith(first[:20])
    # without a cache: the same conversation read at once, with the weights that were held
    talk.turns, answer = talk.turns[:3], talk.turns[3]["content"]
    inputs = served.encode(talk.text(talk.turns))
    row = torch.tensor([list(weights.values())])
    tokens = served.model.generate(**inputs, sapt_weights=row, max_new_tokens=4, do_sample=False)
    again = served.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.split() == again.split()


def test_each_turn_has_the_mixture_of_its_own_prompt(pool: Path, capsys, monkeypatch) -> None:
    """As if it were asked alone; what no task claims is the base model's."""
    talk = chat.Conversation(Served(pool), 4)
    for name in ("a", "b", "a"):
        talk.say(prompt_of(name))
        assert talk.weights == talk.served.weights(talk.text([{"role": "user", "content": prompt_of(name)}]))
        assert max(talk.weights, key=lambda task: talk.weights[task]) == name
    monkeypatch.setattr(Served, "weights", lambda self, prompt, allowed=None: {})
    monkeypatch.setattr(sys, "argv", ["chat", "--pool", str(pool), "--max-new-tokens", "3", "--say", prompt_of("b")])
    assert chat.main() == 0 and "[the base model" in capsys.readouterr().out


def test_what_no_task_claims_is_served_by_the_base_model(served: Served, tmp_path, monkeypatch) -> None:
    model = served.model
    monkeypatch.setattr(model, "attention_weights", lambda **batch: torch.zeros(1, 3))
    assert served.weights(prompt_of("a")) == {} == served.weights(prompt_of("a"), ["b"])
    base = AutoModelForCausalLM.from_pretrained(model.base_model.model.name_or_path)
    assert served.answer(prompt_of("a"), {}, 8).text == greedy(served, base, prompt_of("a"))
    mixtures = serve_vllm.Mixtures(served, tmp_path)
    assert mixtures.adapter(prompt_of("a")) is None and not list(tmp_path.iterdir())


def test_lines_are_written_as_in_training(pool: Path, capsys, monkeypatch) -> None:
    talk = chat.Conversation(Served(pool), 3, wrap="{} w5\nw6")
    talk.say("w20 w21")
    assert talk.text(talk.turns).startswith("w20 w21 w5\nw6")
    prompt = " ".join(prompt_of("b").split()[:-1])
    monkeypatch.setattr(sys, "argv", ["chat", "--pool", str(pool), "--wrap", "{}\\nw5", "--say", prompt])
    assert chat.main() == 0 and "[b " in capsys.readouterr().out


def test_chat_commands(pool: Path, capsys, monkeypatch) -> None:
    lines = ["/task b", prompt_of("a"), "/auto", prompt_of("a"), "/nonsense"]
    monkeypatch.setattr(sys, "argv", ["chat", "--pool", str(pool), "--max-new-tokens", "3",
                                      *(word for line in lines for word in ("--say", line))])  # fmt: skip
    assert chat.main() == 0
    shown = capsys.readouterr().out
    shares = re.findall(r"\[(\w) ([\d.]+)", shown)
    assert shares[0] == ("b", "1.00") and shares[1][0] == "a" and "There are /task NAME" in shown
    monkeypatch.setattr(sys, "argv", ["chat", "--pool", "nowhere"])
    assert chat.main() == 1 and "nowhere holds no" in capsys.readouterr().err


# --- LoRA servers ---------------------------------------------------------------------------------------------------


def test_the_adapters_answer_as_the_pool_in_plain_peft(served: Served, tmp_path) -> None:
    mixtures = serve_vllm.Mixtures(served, tmp_path, decimals=None)
    for name in TASKS:
        adapter = mixtures.adapter(prompt_of(name))
        base = AutoModelForCausalLM.from_pretrained(served.model.base_model.model.name_or_path)
        plain = PeftModel.from_pretrained(base, adapter.folder).eval()
        inputs = served.encode(prompt_of(name))
        with torch.no_grad():
            torch.testing.assert_close(plain(**inputs).logits, served.model(**inputs).logits, atol=1e-4, rtol=1e-4)
        config = json.loads((adapter.folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and config["r"] <= mixtures.max_rank in serve_vllm.RANKS
    assert [a.number for a in mixtures.known.values()] == [1, 2, 3], "each adapter has a number of its own"


def test_rounded_mixtures_are_shared_and_the_oldest_go(served: Served, tmp_path) -> None:
    mixtures = serve_vllm.Mixtures(served, tmp_path, keep=2, decimals=1)
    one = mixtures.adapter(prompt_of("a"))
    assert mixtures.adapter(prompt_of("a")) is one and mixtures.made == 1
    assert sum(one.weights.values()) == pytest.approx(1)
    for name in ("b", "c"):
        mixtures.adapter(prompt_of(name))
    assert not one.folder.exists() and len(list(tmp_path.iterdir())) == 2


def test_the_recipe_shows_its_requests(pool: Path, tmp_path, capsys, monkeypatch) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(prompt_of(name) for name in TASKS))
    monkeypatch.setattr(sys, "argv", ["serve", "--pool", str(pool), "--prompts", str(prompts), "--dry-run",
                                      "--adapters", str(tmp_path / "loras")])  # fmt: skip
    assert serve_vllm.main() == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [max(r["weights"], key=r["weights"].get) for r in shown] == TASKS
    assert all((Path(r["lora"]) / "adapter_model.safetensors").is_file() for r in shown)
