"""States that go wrong quietly: threads, interrupts, rollbacks, packed rows, foreign rows, other dtypes."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from helpers.tiny import PAD, build_pool, commit, grow, padded, token_rows
from helpers.training import fresh_pool
from helpers.words import collate, tokenizer
from peft_sapt import ArmCallback, SaptConfig
from peft_sapt.arm.generator import end_token, without_closing
from peft_sapt.errors import PromptError, ReflectionError, TaskError

ROWS = token_rows([5, 9, 3, 14])


def logits(model, rows, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**padded(rows), **kwargs).logits


def test_threads_share_a_model_without_sharing_weights() -> None:
    model = build_pool("llama", ["a", "b", "c"]).eval()
    batches = [ROWS[:2], ROWS[2:]]
    expected = [logits(model, rows) for rows in batches]
    wrong: list[str] = []

    def serve(i: int) -> None:
        for _ in range(40):
            try:
                if not torch.allclose(logits(model, batches[i]), expected[i], atol=1e-5):
                    wrong.append("values")
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_forward_leaves_nothing_behind(pool, error) -> None:
    extra = {"decoder_input_ids": torch.tensor([[1, 5]] * 2)} if pool.config.is_encoder_decoder else {}
    expected, named = logits(pool, ROWS[2:], **extra), logits(pool, ROWS[2:], sapt_task="b", **extra)
    generated = pool.generate(**padded(ROWS[2:]), max_new_tokens=3)
    layer = next(m for m in pool.modules() if hasattr(m, "sapt_A"))

    def stop(*args) -> None:
        raise error

    for call, result in (
        (lambda: logits(pool, ROWS[2:], **extra), expected),
        (lambda: logits(pool, ROWS[2:], sapt_task="b", **extra), named),
        (lambda: pool.generate(**padded(ROWS[2:]), max_new_tokens=3), generated),
    ):
        handle = layer.register_forward_pre_hook(stop)
        with pytest.raises(error):
            logits(pool, ROWS[:2], **extra)
        handle.remove()
        assert torch.equal(call(), result)


def test_an_unloaded_base_is_a_plain_model_again(pool) -> None:
    base = pool.unload()
    base.load_state_dict(base.state_dict())
    again = get_peft_model(base, SaptConfig(tasks=["x", "y"], target_modules=["q_proj", "v_proj", "q", "v"]))
    assert again.base_model.tasks == ["x", "y"]


def test_frozen_blocks_are_never_rounded_by_a_half_precision_base(tmp_path) -> None:
    model = build_pool("llama", ["a", "b", "c"])
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        base = build_pool("llama", ["a", "b", "c"]).unload().to(torch.bfloat16)
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_memory)
        for name in model.tasks:
            for key, tensor in loaded.task_state(name).items():
                assert torch.equal(tensor, model.task_state(name)[key]), (key, tensor.dtype)
        loaded.eval()(**padded(ROWS))


@pytest.mark.parametrize("low_memory", [False, True])
def test_without_autocast_blocks_have_the_number_type_of_the_base_or_of_their_file(tmp_path, low_memory) -> None:
    """New blocks are as small as plain LoRA's; what a file holds is never rounded."""

    def low_base():
        return build_pool("llama", ["a", "b", "c"]).unload().to(torch.bfloat16)

    config = SaptConfig(task_type="CAUSAL_LM", tasks=["a", "b", "c"], init_weights=False)
    small = get_peft_model(low_base(), config, autocast_adapter_dtype=False).eval()
    blocks = {p.dtype for n, p in small.named_parameters() if ".sapt_A." in n or ".sapt_old_B." in n}
    assert blocks == {torch.bfloat16}
    attention = {p.dtype for n, p in small.named_parameters() if ".sapt_key." in n or ".sapt_query_down." in n}
    assert attention == {torch.float32}
    small.save_pretrained(tmp_path / "small")
    build_pool("llama", ["a", "b", "c"]).save_pretrained(tmp_path / "wide")
    settings = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": low_memory}
    for kind, dtype in (("small", torch.bfloat16), ("wide", torch.float32)):
        loaded = PeftModel.from_pretrained(low_base(), tmp_path / kind, **settings).eval()
        loaded.save_pretrained(tmp_path / "again")
        first, again = (load_file(tmp_path / n / "adapter_model.safetensors") for n in (kind, "again"))
        assert first.keys() == again.keys()
        assert all(torch.equal(first[k], again[k]) for k in first if not k.endswith("sapt_manifest"))
        assert {p.dtype for n, p in loaded.named_parameters() if ".sapt_A." in n} == {dtype}
        loaded.add_adapter("new", copy.deepcopy(config), autocast_adapter_dtype=False)
        assert {p.dtype for n, p in loaded.named_parameters() if ".sapt_A.new" in n} == {torch.bfloat16}
        loaded(**padded(ROWS))
    grow(small, "d")
    small.train()
    batch = padded(ROWS, "right")
    small(**batch, labels=batch["input_ids"].index_fill(1, torch.tensor([0, 1]), -100)).loss.backward()
    gradients = [p.grad for n, p in small.named_parameters() if ".sapt_A." in n]
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients)


def test_rows_of_padding_are_refused_at_commit() -> None:
    model = build_pool("llama", ["a"])
    batch = padded(ROWS)
    batch["attention_mask"][1] = 0
    for arguments in (
        {"inputs": [batch]},
        {"inputs": [padded(ROWS)], "replay": [batch]},
        {"inputs": torch.full((2, 64), float("inf"))},
    ):
        with pytest.raises(PromptError, match=r"rows \[.*nothing was changed"):
            model.commit_task(**arguments)
        assert model.committed_tasks == []
    assert all(p.isfinite().all() for p in model.parameters())


def test_rows_seen_belong_to_their_pool() -> None:
    model = build_pool("llama", ["a", "b"]).train()
    ids = torch.tensor(token_rows([6, 6]))
    labels = ids.masked_fill(torch.arange(6) < 4, -100)
    model(input_ids=ids, labels=labels)
    model.add_adapter("other", SaptConfig(task_type="CAUSAL_LM", tasks=["x", "y"]))
    model.set_adapter("other")
    with pytest.raises(TaskError, match=r"'y' cannot be committed, since no training prompt of it is known"):
        model.commit_task()
    assert model.committed_tasks == ["x"]


def test_removing_a_task_keeps_the_others_committed() -> None:
    model = build_pool("llama", ["a", "b", "c"])
    memory = model.base_model.hooks.memory
    memory.targets("default").copy_(torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0.5, 0.3, 0.2]]))
    model.remove_task("a")
    assert model.committed_tasks == ["b", "c"]
    torch.testing.assert_close(memory.targets("default"), torch.tensor([[1.0, 0.0], [0.6, 0.4]]))


def test_loading_an_open_pool_over_a_committed_one_opens_it(tmp_path) -> None:
    model = build_pool("llama", ["a", "b"])
    model.save_pretrained(tmp_path)
    commit(model)
    assert not any(p.requires_grad for p in model.parameters())
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert model.committed_tasks == ["a"]
    assert any(p.requires_grad for n, p in model.named_parameters() if ".sapt_A." in n)


def test_position_ids_of_left_padded_rows_are_not_packing() -> None:
    pool = build_pool("llama", ["a", "b", "c"]).eval()
    batch = padded(ROWS)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    torch.testing.assert_close(pool(**batch, position_ids=positions).logits[3], pool(**batch).logits[3])


def test_packed_rows_of_an_encoder_decoder_are_refused() -> None:
    ids = torch.tensor(token_rows([8]))
    with pytest.raises(PromptError, match="Packed rows"):
        build_pool("t5", ["a", "b"])(input_ids=ids, labels=ids, position_ids=torch.tensor([[0, 1, 2, 3] * 2]))


def test_a_shared_head_is_not_overwritten_by_a_second_task() -> None:
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=1,
    )
    model = get_peft_model(LlamaForSequenceClassification(config), SaptConfig(task_type="SEQ_CLS", task_name="a"))
    with pytest.raises(TaskError, match="one head"):
        model.add_task("b")
    assert model.tasks == ["a"]


def test_generate_masks_the_pads_it_would_mask_itself() -> None:
    model = build_pool("llama", ["a", "b", "c"]).eval()
    batch = padded(ROWS)
    settings = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**batch, **settings)
    model.config.pad_token_id = None
    model.generation_config.pad_token_id = PAD
    assert torch.equal(model.generate(batch["input_ids"], **settings), expected)
    model.generation_config.pad_token_id = None
    assert torch.equal(model.generate(batch["input_ids"], pad_token_id=PAD, **settings), expected)


def test_a_task_for_encoder_outputs_alone() -> None:
    model = build_pool("t5", ["a", "b", "c"]).eval()
    batch = padded(ROWS)
    encoded = model.get_encoder()(**batch, sapt_task="b")
    named = model.generate(encoder_outputs=encoded, attention_mask=batch["attention_mask"], sapt_task="b")
    assert torch.equal(named, model.generate(**batch, sapt_task="b"))


def test_end_tokens_inside_prompts() -> None:
    known = tokenizer()
    eos = known.eos_token_id
    assert without_closing([[4, 5, eos], [6, eos]], eos) == ([[4, 5], [6]], [eos])
    assert without_closing([[4, 5, eos], [6]], eos) == ([[4, 5, eos], [6]], [])
    assert end_token(known, [[4, 5]]) == eos
    assert end_token(known, [[4, eos, 5]]) in set(known.all_special_ids) - {eos}
    with pytest.raises(ReflectionError, match="special token"):
        end_token(known, [known.all_special_ids])


def test_copies_are_recognised_behind_a_closing_end_token(monkeypatch) -> None:
    """T5's tokenizer ends every prompt with </s>; a drawn row never does."""
    model = fresh_pool()
    arm = ArmCallback(tokenizer(), replay="generated", min_pseudo_samples=1)
    arm.prepare(model, [collate([{"input_ids": [10, 11, 2, 70], "labels": [-100, -100, -100, 70]}] * 4)])

    def draw(model, selection, *arguments) -> None:
        selection.offer([10, 11], True)
        selection.offer([10, 12], True)

    monkeypatch.setattr("peft_sapt.arm.replay.draw", draw)
    arm.reflect(model)
    assert (arm.reports["a"]["copies"], arm.reports["a"]["kept"]) == (1, 1)
    expected = model.pooled_prompts([{"input_ids": torch.tensor([[10, 12, 2]])}])
    assert torch.equal(model.base_model.hooks.memory.replay("default")[0], expected)
