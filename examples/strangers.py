r"""Which prompts a pool leaves to its base model, and how prompts in other words find their block.

    python examples/strangers.py --name quickstart                                    # the quickstart's four tasks
    python examples/strangers.py --name core --tasks-dir <five tasks>
    python examples/strangers.py --name core-no-definitions --tasks-dir <five tasks> --no-definitions --others <all>

Shows the tasks' training prompts to a pool, as ArmCallback does, and trains no block: what is measured is which block
would answer. Sixty everyday prompts in five forms, thirty sentences of somebody else's for each task, and a dozen
renderings of the tasks' own prompts come from prompts/validation.json, by which things were chosen, or from
prompts/test.json. One JSON file for each kind of features and router, in --out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from settings import QUICK_ROWS  # noqa: F401  # sets the environment of the examples
from synthetic import make_stream

from peft_sapt import ArmCallback, SaptConfig
from peft_sapt.continual.base import load_base
from peft_sapt.continual.prompts import PromptStyle, left_padded
from peft_sapt.continual.provenance import environment
from peft_sapt.continual.streams import load_folder
from peft_sapt.routing import strangers

BATCH, NEW_TOKENS = 32, 24
INSTRUCTION = "Answer the question of the user in one short sentence."
OFFSETS = [round(-0.5 + 0.05 * i, 2) for i in range(25)]  # added to every limit, for the curve
Encode = Callable[[str], list[int]]


def forms_for(tokenizer: Any, tail: str) -> dict[str, Encode]:
    """The forms in which an everyday prompt comes: bare, in the trained wrapper, and in the chat template."""

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    def chat(text: str, system: str | None = None) -> list[int]:
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": text})
        return plain(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    return {
        "bare": plain,
        "trained wrapper": lambda text: plain(text + tail),
        "chat": chat,
        "chat, instruction to the system": lambda text: chat(text, INSTRUCTION),
        "chat, instruction of the user": lambda text: chat(f"{INSTRUCTION}\n{text}"),
    }


def renderings_for(tokenizer: Any, tail: str) -> dict[str, Encode]:
    """Ways to write a trained prompt, ``text`` being what stands before the wrapper's end."""
    forms = forms_for(tokenizer, tail)
    plain, chat = forms["bare"], forms["chat"]
    return {
        "plain": lambda text: plain(text + tail),
        "chat template": lambda text: chat(text + tail),
        "chat template, without the wrapper": chat,
        "chat template, another system prompt": lambda text: forms["chat, instruction to the system"](text + tail),
        "without the wrapper": plain,
        "lower case": lambda text: plain(text.lower() + tail),
        "upper case": lambda text: plain(text.upper() + tail),
        "Input: ... Answer:": lambda text: plain(f"Input: {text}\nAnswer:"),
        "Q: ... A:": lambda text: plain(f"Q: {text}\nA:"),
        "blank lines and spaces": lambda text: plain(f"\n\n {text} \n\nOutput: "),
        "a polite request before it": lambda text: plain(f"Please help me with this one: {text}{tail}"),
        "in quotation marks": lambda text: plain(f'"{text}"{tail}'),
    }


class Subject:
    """A pool that has been shown the training prompts of a stream."""

    def __init__(self, args: argparse.Namespace, features: str, router: str, stream: dict[str, Any]) -> None:
        base, self.tokenizer = load_base(args.model, args.models)
        self.style = PromptStyle(tail=args.tail, definitions=args.definitions, max_tokens=args.max_tokens)
        first = next(iter(stream))
        config = SaptConfig(
            task_type="CAUSAL_LM", task_name=first, r=1, layers_to_transform=[0], features=features, router=router
        )
        self.model: Any = get_peft_model(base, config)
        arm = ArmCallback(self.tokenizer)
        for name, splits in stream.items():
            if name not in self.model.tasks:
                self.model.add_task(name)
            prompts = [self.style.ids(self.tokenizer, row) for row in splits["train"][: args.rows]]
            arm.prepare(self.model, self.batches(prompts), seed=args.seed)
            arm.reflect(self.model, seed=args.seed)
            print(f"  {features} {router}: {name} shown", flush=True)
        self.model.eval()

    def batches(self, rows: list[list[int]]) -> list[dict[str, torch.Tensor]]:
        return [left_padded(rows[i : i + BATCH], self.tokenizer.pad_token_id) for i in range(0, len(rows), BATCH)]

    def read(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """Of each prompt: its weights, its leading task, and how far its best margin is above that task's limit."""
        pool = self.model.base_model.pool
        pooled, known = pool.pooled_prompts(self.batches(rows)), pool.statistics
        weights, limits = known.sapt_detector["default"].weight, known.sapt_limits["default"].weight.double()
        above = (strangers.margins(pooled, weights, len(limits)) - limits.mT).amax(dim=1)
        log_weights = pool.router.log_weights("default", pooled)
        return {"weights": log_weights.exp(), "led": log_weights.argmax(dim=1), "above": above}

    @torch.no_grad()
    def same_answers(self, rows: list[list[int]]) -> float:
        """Percent of prompts whose greedy answer is the base model's, token for token."""
        same = 0
        for row in rows:
            batch = left_padded([row], self.tokenizer.pad_token_id)
            settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": self.tokenizer.pad_token_id}
            found = self.model.generate(**batch, **settings)
            with self.model.disable_adapter():
                same += torch.equal(found, self.model.generate(**batch, **settings))
        return 100.0 * same / len(rows)


def percent(flags: torch.Tensor) -> float:
    return round(100.0 * float(flags.double().mean()), 1)


def measure(
    subject: Subject, args: argparse.Namespace, stream: dict[str, Any], texts: dict[str, Any]
) -> dict[str, Any]:
    """Everything about one pool, as JSON has it."""
    tokenizer, tasks = subject.tokenizer, subject.model.tasks
    forms, found = forms_for(tokenizer, args.tail), {}
    asked = {form: [encode(text) for text in texts["strangers"]] for form, encode in forms.items()}
    away = {form: subject.read(rows)["above"] for form, rows in asked.items()}
    found["strangers_left_to_base"] = {form: percent(above < 0) for form, above in away.items()}
    if args.answers:
        found["strangers_answered_as_base"] = {form: subject.same_answers(rows) for form, rows in asked.items()}
    own, words = {}, {}
    for i, name in enumerate(tasks):
        rows = stream[name][args.split][: args.test_rows]
        own[name] = subject.read([subject.style.ids(tokenizer, row) for row in rows])
        instruction = rows[0]["instruction"]
        said = [{"instruction": instruction, "input": item["input"]} for item in texts["wordings"][name]]
        words[name] = subject.read([subject.style.ids(tokenizer, row) for row in said])
        own[name]["right"], words[name]["right"] = own[name]["led"] == i, words[name]["led"] == i
    found["own"] = {n: {"led": percent(r["right"]), "left_to_base": percent(r["above"] < 0)} for n, r in own.items()}
    found["words"] = {
        n: {"led": percent(r["right"]), "left_to_base": percent(r["above"] < 0)} for n, r in words.items()
    }
    found["renderings"] = renderings(subject, args, stream)
    every_own, every_word = (torch.cat([r["above"] for r in group.values()]) for group in (own, words))
    found["curve"] = [
        {
            "offset": offset,
            "strangers": min(percent(above < offset) for above in away.values()),
            "own": percent(every_own < offset),
            "words": percent(every_word < offset),
        }
        for offset in OFFSETS
    ]
    return found


def renderings(subject: Subject, args: argparse.Namespace, stream: dict[str, Any]) -> dict[str, Any]:
    """For each way to write trained prompts: own weight, percent led by their block, percent left to the base."""
    found = {}
    for kind, encode in renderings_for(subject.tokenizer, args.tail).items():
        led, away, own = [], [], []
        for i, name in enumerate(subject.model.tasks):
            rows = stream[name][args.split][: args.rendered]
            head = [f"{row['instruction']}\n" if args.definitions and row["instruction"] else "" for row in rows]
            texts = [h + str(row["input"])[: args.characters] for h, row in zip(head, rows, strict=True)]
            read = subject.read([encode(text) for text in texts])
            led.append(read["led"] == i)
            away.append(read["above"] < 0)
            own.append(read["weights"][:, i].masked_fill(away[-1], 0.0))
        found[kind] = {
            "own_weight": round(float(torch.cat(own).mean()), 3),
            "led": percent(torch.cat(led)),
            "left_to_base": percent(torch.cat(away)),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="of the stream, which the files begin with")
    parser.add_argument("--tasks-dir", type=Path, help="by default the quickstart's made-up tasks")
    parser.add_argument("--definitions", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--others", type=Path, help="folder of tasks that the pool has not seen, to be counted too")
    parser.add_argument("--texts", type=Path, default=Path(__file__).parent / "prompts" / "test.json")
    parser.add_argument("--split", default="test", help="split of the tasks' own prompts")
    parser.add_argument("--features", type=lambda text: text.split(","), default=["hidden"])
    parser.add_argument("--routers", type=lambda text: text.split(","), default=["attention", "ridge"])
    parser.add_argument("--answers", action="store_true", help="also compare answers, which takes minutes")
    parser.add_argument("--rows", type=int, default=96, help="training prompts a task")
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--rendered", type=int, default=20, help="prompts a task for the renderings")
    parser.add_argument("--characters", type=int, default=300, help="of a rendered prompt")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--tail", default="\nOutput:")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--models", type=Path, default=Path.home() / ".cache" / "peft-sapt")
    parser.add_argument("--out", type=Path, default=Path("examples/results/strangers"))
    args = parser.parse_args()
    stream = make_stream(args.seed) if args.tasks_dir is None else load_folder(args.tasks_dir)
    texts = json.loads(args.texts.read_text(encoding="utf-8"))
    args.out.mkdir(parents=True, exist_ok=True)
    for features in args.features:
        for router in args.routers:
            path = args.out / f"{args.name}.{args.texts.stem}.{features}.{router}.{args.seed}.json"
            if path.exists():
                continue
            subject = Subject(args, features, router, stream)
            found = measure(subject, args, stream, texts)
            if args.others is not None:
                found["others"] = others(subject, args)
            settings = {"features": features, "router": router, "texts": args.texts.stem, "rows": args.rows}
            settings |= {"definitions": args.definitions, "seed": args.seed, "model": args.model}
            path.write_text(json.dumps({**settings, **found, "environment": environment()}, indent=1) + "\n")
            words, own = found["words"].values(), found["own"].values()
            print(
                f"{path.stem}: strangers left to the base {min(found['strangers_left_to_base'].values())} % at least, "
                f"own {max(r['left_to_base'] for r in own)} % at most; other words led right "
                f"{sum(r['led'] for r in words) / len(words):.1f} %, left to the base "
                f"{sum(r['left_to_base'] for r in words) / len(words):.1f} %",
                flush=True,
            )


def others(subject: Subject, args: argparse.Namespace) -> dict[str, float]:
    """Percent of other tasks' prompts that are left to the base."""
    stream = load_folder(args.others)
    return {
        name: percent(
            subject.read([subject.style.ids(subject.tokenizer, row) for row in splits["test"][: args.test_rows]])[
                "above"
            ]
            < 0
        )
        for name, splits in stream.items()
        if name not in subject.model.tasks
    }


if __name__ == "__main__":
    main()
