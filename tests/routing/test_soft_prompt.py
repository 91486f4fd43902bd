"""SAPT-Prompt: a pool of soft prompts. Judges: PEFT's prompt tuning, and prompts mixed by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from helpers import steps, tiny
from helpers.steps import digests, logits, step
from helpers.tiny import CACHE, PAD, assert_real_pool, build_pool, grow, labelled, padded, tiny_llama, token_rows
from helpers.training import arguments, own_weights
from helpers.words import TASKS, collate, prompts_of, rows_of, tokenizer
from peft_sapt import ArmCallback, GeneratorSettings, SaptConfig, create_optimizer
from peft_sapt.errors import PromptError, PromptFolderError, SaptError, WeightsError

LENGTH = 4
ROWS = token_rows([5, 9, 3, 7])
NAMES = ["a", "b", "c"]


def prompt_pool(family: str = "llama", tasks: list[str] = NAMES, **config):
    return build_pool(family, tasks, block="prompt", num_virtual_tokens=LENGTH, **config).eval()


def prompts(model) -> torch.Tensor:
    """All prompts of the pool, [T, P, d]."""
    held = model.base_model.model.soft_prompts
    parts = held.parts("sapt_prompt", "default", [LENGTH] * len(model.tasks))
    return torch.stack(parts)


def bare(model):
    return copy.deepcopy(model).unload()


def tiny_gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=100, **sizes, pad_token_id=PAD, bos_token_id=3, eos_token_id=2))


MAKERS = {**tiny.FAMILIES, "gpt2": ("CAUSAL_LM", tiny_gpt2)}


@pytest.mark.parametrize("family", MAKERS)
def test_one_prompt_is_pefts_prompt_tuning(family) -> None:
    """Logits, loss and the prompt's gradient; PEFT's logits have the virtual positions in front."""
    task_type, make = MAKERS[family]
    torch.manual_seed(0)
    base = make().eval()
    config = SaptConfig(task_type=task_type, block="prompt", num_virtual_tokens=LENGTH, task_name="a")
    ours = get_peft_model(copy.deepcopy(base), config)
    theirs = get_peft_model(base, PromptTuningConfig(task_type=task_type, num_virtual_tokens=LENGTH))
    own = ours.base_model.model.soft_prompts.sapt_prompt["default"].weight
    other = theirs.prompt_encoder.default.embedding.weight
    with torch.no_grad():
        other[:LENGTH] = own
    batch = labelled(family, ROWS)
    found, expected = ours(**batch), theirs(**batch)
    skip = 0 if family == "t5" else LENGTH
    keep = slice(None) if family == "t5" else batch["attention_mask"].bool()
    torch.testing.assert_close(found.logits[keep], expected.logits[:, skip:][keep], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    found.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(own.grad, other.grad[:LENGTH], rtol=1e-4, atol=1e-7)
    trained = {n for n, p in ours.named_parameters() if p.grad is not None and "soft_prompts" in n}
    assert len(trained) == 1


def test_the_mixed_prompt_stands_before_the_input(family) -> None:
    """By hand: embeddings of the row behind sum_t w_t P_t, on the base model."""
    pool = prompt_pool(family)
    base, batch = bare(pool), padded(ROWS, "right")
    weights = pool.attention_weights(**batch)
    assert_real_pool(weights)
    mixed = sum(w[:, None, None] * p for w, p in zip(weights.T, prompts(pool), strict=True))  # [B, P, d]
    embeddings = torch.cat([mixed, base.get_input_embeddings()(batch["input_ids"])], dim=1)
    mask = torch.cat([torch.ones(len(ROWS), LENGTH, dtype=torch.long), batch["attention_mask"]], dim=1)
    decoder = {"decoder_input_ids": batch["input_ids"][:, :2]} if family == "t5" else {}
    with torch.no_grad():
        expected = base(inputs_embeds=embeddings, attention_mask=mask, **decoder).logits
        found = pool(**batch, **decoder).logits
    if family == "t5":
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        return
    keep = batch["attention_mask"].bool()
    torch.testing.assert_close(found[keep], expected[:, LENGTH:][keep], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_depends_on_that_row_alone(family, side, monkeypatch) -> None:
    monkeypatch.setitem(tiny.FAMILIES, family, MAKERS[family])
    pool, batch = prompt_pool(family), padded(ROWS, side, extra=2)
    decoder = torch.tensor([[3, 7]]) if family == "t5" else None
    with torch.no_grad():
        extra = {} if decoder is None else {"decoder_input_ids": decoder.expand(len(ROWS), -1)}
        together = pool(**batch, **extra).logits
        for i, row in enumerate(ROWS):
            extra = {} if decoder is None else {"decoder_input_ids": decoder}
            alone = pool(**padded([row]), **extra).logits[0]
            found = together[i] if decoder is not None else together[i][batch["attention_mask"][i].bool()]
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation(family, beams, monkeypatch) -> None:
    """A padded batch as each row alone, with and without a cache, and the first token as the forward says."""
    monkeypatch.setitem(tiny.FAMILIES, family, MAKERS[family])
    pool, batch = prompt_pool(family), padded(ROWS)
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": PAD}
    together = pool.generate(**batch, **settings)
    torch.testing.assert_close(pool.generate(**batch, **settings, use_cache=False), together)
    for i, row in enumerate(ROWS):
        alone = pool.generate(**padded([row]), **settings)[0]
        start = (0, 0) if family == "t5" else (batch["input_ids"].shape[1], len(row))
        answer = alone[start[1] :]
        assert torch.equal(together[i][start[0] :][: len(answer)], answer)
    if beams == 1 and family != "t5":
        last = pool(**batch).logits[:, -1].argmax(dim=-1)
        assert torch.equal(together[:, batch["input_ids"].shape[1]], last)
    with pytest.raises(WeightsError, match="expected"):
        pool.generate(**batch, **settings, sapt_weights=[0.5, 0.5])
    named = pool.generate(**batch, **settings, sapt_task="b")
    assert torch.equal(pool.generate(**batch, **settings, sapt_weights=[0.0, 1.0, 0.0]), named)


def test_decoding_by_hand_on_a_cache() -> None:
    pool, row = prompt_pool(), ROWS[1]
    expected = pool.generate(**padded([row]), max_new_tokens=4, do_sample=False, pad_token_id=PAD)[0, len(row) :]
    for masked in (True, False):
        ids, found, cache = torch.tensor([row]), [], None
        mask = torch.ones_like(ids)
        with torch.no_grad():
            for _ in range(len(expected)):
                given = {"attention_mask": mask} if masked else {}
                out = pool(input_ids=ids, **{CACHE: cache}, use_cache=True, **given)
                assert out.logits.shape[1] == ids.shape[1]
                ids, cache = out.logits[:, -1:].argmax(dim=-1), out[CACHE]
                mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
                found.append(int(ids))
        assert found == expected.tolist()


def test_encoder_outputs_carry_prompt_and_weights() -> None:
    pool, batch = prompt_pool("t5"), padded(ROWS)
    decoder = batch["input_ids"][:, :2]
    with torch.no_grad():
        expected = pool(**batch, decoder_input_ids=decoder).logits
        encoded = pool.get_base_model().get_encoder()(**batch)
        assert encoded.last_hidden_state.shape[1] == batch["input_ids"].shape[1] + LENGTH
        found = pool(encoder_outputs=encoded, attention_mask=batch["attention_mask"], decoder_input_ids=decoder).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_logits_have_the_length_of_the_input() -> None:
    pool, batch = prompt_pool(), padded(ROWS)
    width = batch["input_ids"].shape[1]
    with torch.no_grad():
        whole = pool(**batch).logits
        assert whole.shape[1] == width
        as_tuple = pool(**batch, return_dict=False)
        torch.testing.assert_close(as_tuple[0], whole)
        torch.testing.assert_close(pool(**batch, logits_to_keep=2).logits, whole[:, -2:])
        picked = torch.tensor([1, width - 1])
        attended = batch["attention_mask"][:, picked].bool()  # what a model says at padding is nothing
        torch.testing.assert_close(pool(**batch, logits_to_keep=picked).logits[attended], whole[:, picked][attended])
        embeds = pool.get_input_embeddings()(batch["input_ids"])
        torch.testing.assert_close(pool(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits, whole)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant) -> None:
    gradients = []
    for checkpointed in (False, True):
        pool = prompt_pool()
        pool.train()
        if checkpointed:
            pool.gradient_checkpointing_enable({"use_reentrant": reentrant})
            pool.enable_input_require_grads()
        pool(**labelled("llama", ROWS)).loss.backward()
        gradients.append({n: p.grad for n, p in pool.named_parameters() if p.grad is not None})
    plain, found = gradients
    assert set(plain) == set(found) and any("sapt_prompt" in name for name in plain)
    assert any("sapt_key" in name for name in plain) and not any("old" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("router", ["attention", "ridge"])
def test_the_life_cycle(family, router, tmp_path) -> None:
    """Old bytes never change; save, load, copy, pickle, remove, switch off."""
    pool = build_pool(family, ["a"], block="prompt", num_virtual_tokens=LENGTH, router=router)
    known = {}
    for name in ("b", "c"):
        if router == "ridge" and not pool.base_model.router.is_fitted("default"):
            pool.fit_router([padded(ROWS)])
        step(pool)
        before = digests(pool, pool.current_task)
        step(pool)
        assert digests(pool, pool.current_task) != before
        pool.commit_task([padded(ROWS)])
        known[pool.current_task] = digests(pool, pool.current_task)
        pool.add_task(name)
        assert all(digests(pool, old) == known[old] for old in known)
    expected = logits(pool)
    pool.save_pretrained(tmp_path)
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "attention.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    loaded = PeftModel.from_pretrained(bare(pool), tmp_path)
    assert loaded.tasks == ["a", "b", "c"] and torch.equal(logits(loaded), expected)
    for copied in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert torch.equal(logits(copied), expected)
    with pool.disable_adapter():
        plain = logits(pool)
    assert torch.equal(plain, logits(bare(pool))) and not torch.equal(plain, expected)
    pool.remove_task("b")
    assert pool.tasks == ["a", "c"] and digests(pool, "a") == known["a"] and prompts(pool).shape[0] == 2
    weights = pool.attention_weights(**padded(steps.ROWS))
    loaded.remove_task("b")
    torch.testing.assert_close(logits(loaded, sapt_weights=weights), logits(pool))


def test_a_new_prompt_begins_as_tokens_of_the_base() -> None:
    torch.manual_seed(0)
    base = tiny_llama()
    table = base.get_input_embeddings().weight.detach().clone()
    pool = get_peft_model(base, SaptConfig(task_type="CAUSAL_LM", block="prompt", num_virtual_tokens=LENGTH))
    grow(pool, "second")
    for row in prompts(pool).flatten(0, 1):
        assert bool((table == row).all(dim=1).any())
    assert not torch.equal(*prompts(pool))


def test_prompts_and_blocks_on_one_model(tmp_path) -> None:
    pool = prompt_pool()
    with_prompts = logits(pool)
    lora = SaptConfig(task_type="CAUSAL_LM", tasks=["x", "y", "z"], init_weights=False)
    pool.add_adapter("blocks", lora)
    assert torch.equal(logits(pool), with_prompts)
    pool.set_adapter("blocks")
    assert pool.tasks == ["x", "y", "z"] and not torch.equal(logits(pool), with_prompts)
    pool.delete_adapter("blocks")
    pool.set_adapter("default")
    assert torch.equal(logits(pool), with_prompts)


def test_an_exported_prompt_is_the_pool_with_that_task(family, tmp_path) -> None:
    pool = prompt_pool(family)
    weights = pool.attention_weights(**padded(ROWS))[0]
    pool.export_task("b", tmp_path / "task")
    pool.export_mixture(weights, tmp_path / "mixture")
    batch = padded([ROWS[1]])
    extra = {"decoder_input_ids": batch["input_ids"][:, :2]} if family == "t5" else {}
    skip = 0 if family == "t5" else LENGTH
    for folder, given in (("task", {"sapt_task": "b"}), ("mixture", {"sapt_weights": weights})):
        plain = PeftModel.from_pretrained(bare(pool), tmp_path / folder)
        assert type(plain.peft_config["default"]) is PromptTuningConfig
        with torch.no_grad():
            found, expected = plain(**batch, **extra).logits[:, skip:], pool(**batch, **extra, **given).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    pool.commit_task([padded(ROWS)])
    pool.import_task("back", tmp_path / "task")
    assert torch.equal(prompts(pool)[3], prompts(pool)[1]) and pool.current_task == "back"
    with pytest.raises(PromptFolderError, match=r"prompt of \[4, 64\]; this pool's have \[5, 64\]"):
        other = build_pool(family, ["a"], block="prompt", num_virtual_tokens=5)
        other.import_task("new", tmp_path / "task")
    assert other.tasks == ["a"]
    other = build_pool(family, ["a"], block="prompt", num_virtual_tokens=7)
    other.export_task("a", tmp_path / "longer")
    with pytest.raises(PromptFolderError, match=r"prompt of \[7, 64\]; this pool's have \[4, 64\]"):
        pool.import_task("longer", tmp_path / "longer")
    with pytest.raises(PromptFolderError, match="'LORA', not a PROMPT_TUNING"):
        build_pool(family, ["a"]).export_task("a", tmp_path / "lora")
        pool.import_task("lora", tmp_path / "lora")
    with pytest.raises(PromptFolderError, match="holds a SAPT pool"):
        pool.save_pretrained(tmp_path / "pool")
        pool.export_task("a", tmp_path / "pool")


@pytest.mark.parametrize(
    ("router", "replay", "wanted"),
    [("attention", "rows", 0.9), ("ridge", "rows", 0.9), ("attention", "generated", 0.4)],
)
def test_arm_with_the_trainer(tmp_path, router, replay, wanted) -> None:
    """With samples of a random base the own block leads for 0.45 to 1.0 of the prompts, by seed; chance is 1/3."""
    torch.manual_seed(0)
    base = tiny_llama()
    torch.nn.init.normal_(base.get_input_embeddings().weight)
    model = get_peft_model(
        base, SaptConfig(task_type="CAUSAL_LM", task_name="a", block="prompt", num_virtual_tokens=3, router=router)
    )
    settings = GeneratorSettings(epochs=30, learning_rate=2e-2, lora_dropout=0.0)
    arm = ArmCallback(tokenizer(), replay=replay, generator=settings)
    for task in TASKS:
        if task not in model.tasks:
            model.add_task(task)
        args = arguments(tmp_path, label_smoothing_factor=0.0)
        Trainer(
            model=model,
            args=args,
            train_dataset=rows_of(task),
            data_collator=collate,
            callbacks=[arm],
            optimizers=create_optimizer(model, args, attention_lr=1e-3),
        ).train()
    assert model.committed_tasks == TASKS
    for task, (leading, mean) in own_weights(model.eval()).items():
        assert leading >= wanted and mean >= min(wanted, 0.5), (task, leading, mean)
    assert model.generate(**prompts_of("a", 2), max_new_tokens=2, do_sample=False).shape[0] == 60


def test_label_smoothing_sees_logits_of_the_inputs_length(tmp_path) -> None:
    model = prompt_pool()
    args = arguments(tmp_path, label_smoothing_factor=0.1, max_steps=2, remove_unused_columns=False)

    def marked(rows):
        batch = collate(rows)
        return {**batch, "sapt_prompt_mask": (batch["labels"] == -100) & batch["attention_mask"].bool()}

    found = Trainer(model=model, args=args, train_dataset=rows_of("a"), data_collator=marked).train()
    assert found.training_loss > 0


STATIC = {"cache_implementation": "static"}


def test_what_soft_prompts_cannot_do_is_refused() -> None:
    pool, batch = prompt_pool(), padded(ROWS)
    helper = bare(pool)
    for given, what in (
        (STATIC, "a cache other than the default"),
        ({"assistant_model": helper}, "assisted decoding"),
        ({"prompt_lookup_num_tokens": 2}, "prompt lookup"),
        ({"prefill_chunk_size": 2}, "chunked prefill"),
    ):
        with pytest.raises(SaptError, match=what):
            pool.generate(**batch, max_new_tokens=2, **given)
    with torch.no_grad():
        filled = helper(**batch, use_cache=True)[CACHE]
        own = pool(**batch, use_cache=True)[CACHE]
    with pytest.raises(SaptError, match="filled cache"):
        pool.generate(**batch, max_new_tokens=2, **{CACHE: own})
    with pytest.raises(WeightsError, match="filled without this pool's soft prompts"):
        pool(input_ids=batch["input_ids"][:, -1:], **{CACHE: filled}, sapt_task="a")
    with pytest.raises(PromptError, match="Packed rows are not supported with block='prompt'"):
        pool(input_ids=batch["input_ids"][:1], position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]))
    square = torch.ones(4, 1, 9, 9)
    with pytest.raises(PromptError, match="4 dimensions"):
        pool(input_ids=batch["input_ids"], attention_mask=square, sapt_task="a")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proj"]}, "target_modules is for block='lora'"),
        ({"layers_to_transform": [1]}, "layers_to_transform is for block='lora'"),
        ({"lora_dropout": 0.1}, "lora_dropout is for block='lora'"),
        ({"task_type": "SEQ_CLS"}, "not for SEQ_CLS"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a positive int"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(fields, message) -> None:
    with pytest.raises(SaptError, match=message):
        SaptConfig(**{"task_type": "CAUSAL_LM", "block": "prompt", **fields})


def test_plain_lora_beside_a_prompt_pool_is_untouched() -> None:
    """PEFT's own adapters see no virtual token."""
    torch.manual_seed(0)
    base = tiny_llama()
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    assert not hasattr(lora.get_base_model(), "soft_prompts")
    pool = get_peft_model(base, SaptConfig(task_type="CAUSAL_LM", block="prompt"))
    assert not hasattr(pool.unload(), "soft_prompts")


def test_the_mixed_prompt_is_float32_under_autocast() -> None:
    pool = prompt_pool("llama").eval()
    weights = torch.rand(2, 3)
    plain = pool.base_model.model.soft_prompts.mixed("default", weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            torch.equal(pool.base_model.model.soft_prompts.mixed("default", weights), plain)
            and plain.dtype == torch.float32
        )
