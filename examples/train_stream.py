"""A stream of tasks for a decoder-only model with the stock Trainer and the ARM callback: a loop to copy.

    python examples/train_stream.py --out pool                                # the made-up tasks, SmolLM2-135M
    python examples/train_stream.py --tasks-dir my/tasks --model org/model --out pool --push me/my-pool

Run it again with more tasks and the same --out, and it goes on from the saved pool.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from peft import PeftModel, get_peft_model
from synthetic import make_stream
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from peft_sapt import ArmCallback, SaptConfig, create_optimizer, save_pool
from peft_sapt.continual.base import load_base
from peft_sapt.continual.streams import load_folder


def encoded(tokenizer, row, max_tokens: int) -> dict[str, list[int]]:
    """One row for the Trainer: the labels are -100 on the prompt, from which the query is computed."""
    prompt = tokenizer(f"{row['instruction']}\n{row['input']}".strip()[: 8 * max_tokens], add_special_tokens=False)
    prompt = prompt.input_ids[: max_tokens - 4] + tokenizer("\nOutput:", add_special_tokens=False).input_ids
    answer = [*tokenizer(f" {row['output'][0]}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def learn(model, tokenizer, name: str, rows: list, args: argparse.Namespace) -> None:
    """Train task ``name`` and commit it; a pool that has it committed is left as it is."""
    if name in model.committed_tasks:
        print(f"{name}: learned before")
        return
    if name not in model.tasks:
        model.add_task(name)
    training = TrainingArguments(
        output_dir=str(args.out / "trainer"), num_train_epochs=args.epochs, per_device_train_batch_size=8,
        learning_rate=args.lr, report_to="none", save_strategy="no", logging_steps=5, seed=args.seed,
    )  # fmt: skip
    arm = ArmCallback(tokenizer, replay=args.replay)
    Trainer(
        model=model,
        args=training,
        train_dataset=[encoded(tokenizer, row, args.max_tokens) for row in rows],
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads labels with -100
        callbacks=[arm],
        optimizers=create_optimizer(model, training, attention_lr=3e-4),
    ).train()
    if args.tasks_dir is None or args.show_examples:  # the card then shows how prompts are written
        row = encoded(tokenizer, rows[0], args.max_tokens)
        prompt = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        model.record_task(name, example=tokenizer.decode(prompt)[:200])
    model.record_task(name, data=str(args.tasks_dir or "made up by examples/synthetic.py"), license=args.license)
    save_pool(model, args.out, arm)
    report = arm.reports[name]
    stand = f"{report['kept']} rows" if report["kept"] else "statistics of its prompts"
    print(f"{name}: trained on {len(rows)} rows; {stand} stand for it from now on ({args.replay})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks-dir", type=Path, help="<task>.train.jsonl and so on; made-up tasks by default")
    parser.add_argument("--tasks", type=lambda text: text.split(","), help="these, in this order")
    parser.add_argument("--model", default="smollm2", help="Hub id or folder")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "peft-sapt")
    parser.add_argument(
        "--out", type=Path, default=Path("pool"), help="the pool's folder; an existing one is continued"
    )
    parser.add_argument("--push", metavar="REPO", help="push the pool to this repository of the Hub at the end")
    parser.add_argument("--license", help="of the data, for the model card")
    parser.add_argument("--show-examples", action="store_true", help="a prompt of each task goes into the model card")
    parser.add_argument("--rows", type=int, default=64, help="training rows per task")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--max-tokens", type=int, default=96, help="of a prompt")
    parser.add_argument(
        "--replay", choices=("statistics", "generated", "rows"), default="statistics", help="what stands for old tasks"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_seed(args.seed)
    stream = make_stream(args.seed) if args.tasks_dir is None else load_folder(args.tasks_dir, args.tasks)
    names = args.tasks or list(stream)
    base, tokenizer = load_base(args.model, args.cache)
    if (args.out / "adapter_model.safetensors").is_file():
        model = PeftModel.from_pretrained(base, args.out, is_trainable=True)
        print(f"Going on from {model.tasks}.")
    else:
        model = get_peft_model(base, SaptConfig(task_type="CAUSAL_LM", task_name=names[0]))
    for name in names:
        learn(model, tokenizer, name, stream[name]["train"][: args.rows], args)
    model.eval()
    for name in names:
        row = stream[name]["test"][0]
        ids = encoded(tokenizer, row, args.max_tokens)
        asked = [i for i, label in zip(ids["input_ids"], ids["labels"], strict=True) if label == -100]
        prompt = torch.tensor([asked], device=model.device)
        tokens = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6)
        answer = tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True).strip()
        weights = model.attention_weights(prompt)[0]
        lead = model.tasks[int(weights.argmax())]
        print(f"{name}: {answer!r}, expected {row['output'][0]!r}, answered by {lead} ({float(weights.max()):.2f})")
    if args.push:
        print("Pushed to", model.push_to_hub(args.push))
    return 0


if __name__ == "__main__":
    sys.exit(main())
