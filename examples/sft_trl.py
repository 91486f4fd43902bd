"""A stream of tasks with TRL's SFTTrainer.

    python examples/sft_trl.py --out sft-pool

Rows are prompt and completion, the loss is on completions alone, and the ARM callback is the stock Trainer's. The
pool is made before the trainer (`peft_config=SaptConfig(...)` works too), so that the attention can have a learning
rate of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from datasets import Dataset
from peft import get_peft_model
from synthetic import make_stream
from trl import SFTConfig, SFTTrainer

from peft_sapt import ArmCallback, SaptConfig, create_optimizer
from peft_sapt.continual.base import load_base


def dataset_of(rows: list) -> Dataset:
    pairs = [{"prompt": f"{row['input']}\nOutput:", "completion": f" {row['output'][0]}"} for row in rows]
    return Dataset.from_list(pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="Hub id or folder of a decoder-only model")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "peft-sapt")
    parser.add_argument("--out", type=Path, default=Path("sft-pool"))
    parser.add_argument("--tasks", type=lambda text: text.split(","), help="of the made-up ones; all by default")
    parser.add_argument("--rows", type=int, default=64, help="training rows per task")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument(
        "--replay", choices=("statistics", "generated", "rows"), default="statistics", help="what stands for old tasks"
    )
    args = parser.parse_args()
    model, tokenizer = load_base(args.model, args.cache)
    arm, stream = ArmCallback(tokenizer, replay=args.replay), make_stream(0)
    names = args.tasks or list(stream)
    model = get_peft_model(model, SaptConfig(task_type="CAUSAL_LM", task_name=names[0]))
    for name in names:
        if name not in model.tasks:
            model.add_task(name)
        settings = SFTConfig(
            output_dir=str(args.out / "trainer"), num_train_epochs=args.epochs, per_device_train_batch_size=8,
            learning_rate=5e-3, max_length=128, completion_only_loss=True, report_to="none", save_strategy="no",
            gradient_checkpointing=False, bf16=False, logging_steps=5,
        )  # fmt: skip
        SFTTrainer(
            model=model,
            args=settings,
            train_dataset=dataset_of(stream[name]["train"][: args.rows]),
            processing_class=tokenizer,
            callbacks=[arm],
            optimizers=create_optimizer(model, settings, attention_lr=3e-4),
        ).train()
    model.save_pretrained(args.out)
    prompts = [f"{stream[name]['test'][0]['input']}\nOutput:" for name in model.tasks]
    for name, prompt in zip(model.tasks, prompts, strict=True):
        batch = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        weights = model.attention_weights(**batch)[0].tolist()
        print(f"{name}: " + ", ".join(f"{task} {w:.2f}" for task, w in zip(model.tasks, weights, strict=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
