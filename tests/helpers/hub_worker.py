"""What a user's process does with the Hub; run by test_hub.py with HF_ENDPOINT set and a cache of its own.

python -m helpers.hub_worker push|grow|pull|train REPO FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments

from helpers.tiny import build_pool, padded, tiny_llama, token_rows
from helpers.words import collate, rows_of, tokenizer
from peft_sapt import ArmCallback
from peft_sapt.errors import PickleError

ROWS = [padded(token_rows([4, 5, 6], seed=seed)) for seed in range(3)]


def base_of(folder: Path):
    base = tiny_llama()
    base.load_state_dict(torch.load(folder / "base.pt", weights_only=True))
    return base


def keep(model, folder: Path, name: str) -> None:
    with torch.no_grad():
        save_file({"logits": model.eval()(**ROWS[0]).logits}, folder / f"{name}.safetensors")


def push(repo: str, folder: Path) -> None:
    model = build_pool("llama", ["a"])
    torch.save(build_pool("llama", ["a"]).unload().state_dict(), folder / "base.pt")
    model.commit_task(inputs=[ROWS[0]], replay=[ROWS[0]])
    model.add_task("b")
    model.commit_task(inputs=[ROWS[1]], replay=[ROWS[1]])
    model.push_to_hub(repo)
    keep(model, folder, "pushed")


def again(repo: str, folder: Path) -> None:
    """The same state once more."""
    PeftModel.from_pretrained(base_of(folder), repo).push_to_hub(repo)


def grow(repo: str, folder: Path) -> None:
    model = PeftModel.from_pretrained(base_of(folder), repo)
    model.add_task("c")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "sapt_B" in name:
                parameter.normal_(std=0.3)
    model.commit_task(inputs=[ROWS[2]], replay=[ROWS[2]])
    model.push_to_hub(repo, commit_message="one more task")
    keep(model, folder, "pushed")


def pull(repo: str, folder: Path) -> None:
    model = PeftModel.from_pretrained(base_of(folder), repo)
    keep(model, folder, "pulled")
    print(model.tasks)


def refuse(repo: str, folder: Path) -> None:
    """A repository whose weights are a pickle."""
    try:
        PeftModel.from_pretrained(base_of(folder), repo)
    except PickleError as error:
        print(error)


def train(repo: str, folder: Path) -> None:
    model = build_pool("llama", ["a"])
    torch.save(build_pool("llama", ["a"]).unload().state_dict(), folder / "base.pt")
    args = TrainingArguments(
        output_dir=str(folder / "out"), max_steps=2, save_steps=1, report_to="none", use_cpu=True, push_to_hub=True,
        hub_model_id=repo, learning_rate=1e-2,
    )  # fmt: skip
    arm = ArmCallback(tokenizer(), replay="rows", min_pseudo_samples=2)
    trainer = Trainer(model=model, args=args, train_dataset=rows_of("a"), data_collator=collate, callbacks=[arm])
    trainer.train()
    trainer.push_to_hub()
    keep(model, folder, "pushed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    globals()[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
