"""TRL's SFTTrainer with peft_config=SaptConfig(...): completion-only loss, full-sequence loss, packing."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from helpers.tiny import tiny_llama
from helpers.words import rows_of, tokenizer
from peft_sapt import ArmCallback, PromptMaskCollator, SaptConfig
from peft_sapt.errors import PromptError

trl = pytest.importorskip("trl", reason="trl is not installed")


def stream(task: str) -> Dataset:
    words = tokenizer()
    rows = [(words.decode(r["input_ids"][:-1]), " " + words.decode(r["input_ids"][-1:])) for r in rows_of(task, 24)]
    return Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in rows])


def trainer(folder, model, config=None, callbacks=(), collator=None, **settings):
    options = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "seed": 0,
        "max_length": 64,
        **settings,
    }
    args = trl.SFTConfig(
        output_dir=str(folder), report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
        gradient_checkpointing=options.pop("gradient_checkpointing", False), **options,
    )  # fmt: skip
    return trl.SFTTrainer(
        model=model,
        args=args,
        train_dataset=stream("a"),
        processing_class=tokenizer(),
        peft_config=config,
        callbacks=list(callbacks),
        data_collator=collator,
    )


def masks_seen(pool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, prompt mask) of each training forward from now on."""
    import peft_sapt.routing.hooks as routing

    seen, read = [], routing.read_prompts

    def spy(module, config, pooling, inputs, training):
        prompts = read(module, config, pooling, inputs, training)
        seen.append((inputs["input_ids"], prompts.mask))
        return prompts

    routing.read_prompts = spy
    return seen


@pytest.fixture(autouse=True)
def undo_spy():
    import peft_sapt.routing.hooks as routing

    read = routing.read_prompts
    yield
    routing.read_prompts = read


def prompts_in(seen) -> set[tuple[int, ...]]:
    return {tuple(ids[row][mask[row]].tolist()) for ids, mask in seen for row in range(len(ids)) if mask[row].any()}


def known_prompts() -> set[tuple[int, ...]]:
    return {tuple(row["input_ids"][:-1]) for row in rows_of("a", 24)}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_completion_only_with_arm(tmp_path, checkpointing) -> None:
    arm = ArmCallback(tokenizer(), replay="rows")
    config = SaptConfig(task_type="CAUSAL_LM", task_name="a")
    sft = trainer(tmp_path, tiny_llama(), config, [arm], gradient_checkpointing=checkpointing)
    seen = masks_seen(sft.model)
    sft.train()
    assert sft.model.committed_tasks == ["a"]
    assert prompts_in(seen) <= known_prompts() and len(prompts_in(seen)) > 4


def test_full_sequence_loss_needs_a_marked_prompt(tmp_path) -> None:
    config = SaptConfig(task_type="CAUSAL_LM", task_name="a")
    with pytest.raises(PromptError, match=r"sapt_prompt_mask"):
        trainer(tmp_path, tiny_llama(), config, completion_only_loss=False).train()
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    inner = DataCollatorForLanguageModeling(pad_token_id=1)
    sft = trainer(
        tmp_path,
        tiny_llama(),
        config,
        collator=PromptMaskCollator(inner),
        completion_only_loss=False,
        remove_unused_columns=False,
    )
    seen = masks_seen(sft.model)
    sft.train()
    assert prompts_in(seen) <= known_prompts() and len(prompts_in(seen)) > 4


@pytest.mark.parametrize("settings", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_packed_samples_have_prompts_of_their_own(tmp_path, settings) -> None:
    config = SaptConfig(task_type="CAUSAL_LM", task_name="a")
    sft = trainer(tmp_path, tiny_llama(), config, **settings)
    sft.train()
    seen = torch.cat(sft.model.base_model.hooks.memory.seen("default"))
    expected = sft.model.base_model.pooled_prompts(
        [{"input_ids": torch.tensor([list(prompt)])} for prompt in known_prompts()]
    )
    distance = (seen.unsqueeze(1) - expected).abs().amax(dim=-1).amin(dim=1)
    assert float(distance.max()) < 1e-6 and len(seen) > 6
