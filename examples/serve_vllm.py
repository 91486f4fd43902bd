"""Serve a pool with vLLM: each prompt's mixture is one exact LoRA, built when it is first needed and then reused.

    python examples/serve_vllm.py --pool quickstart-out/pool --prompts prompts.txt

A mixture of blocks with fixed weights is a LoRA of rank sum(r_t), so a server of per-request LoRAs can answer with it.
The pool itself runs here only for its attention, which needs the lowest layers of the base model (features="hidden")
or its embeddings alone. A prompt that no task claims is answered without any LoRA. vLLM was never run with this
script; the folders it hands over are tested against the pool with plain PEFT (tests/examples/test_serving.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from serving import Served

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM takes for max_lora_rank


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA on disk: its name and number for a LoRA request, its folder, and the weights it stands for."""

    name: str
    number: int
    folder: Path
    weights: dict[str, float]


class Mixtures:
    """Plain LoRA folders by mixture, the least recently used ones deleted beyond ``keep``.

    With ``decimals=None`` every prompt gets its own exact mixture. Rounding the weights lets prompts of one task share
    an adapter; an output of a layer then moves by at most sum_t |w_t - rounded_t| * s_t * ||B_t A_t|| * ||x||.
    """

    def __init__(self, served: Served, folder: Path, keep: int = 64, decimals: int | None = 2) -> None:
        self.served, self.folder, self.keep, self.decimals = served, folder, keep, decimals
        self.known: OrderedDict[str, Adapter] = OrderedDict()
        self.made = 0

    @property
    def max_rank(self) -> int:
        """The smallest rank that vLLM takes and that holds every mixture of this pool."""
        total = sum(self.served.model.peft_config["default"].task_ranks)
        fitting = [rank for rank in RANKS if rank >= total]
        if not fitting:
            raise SystemExit(f"A mixture of all blocks has rank {total}, above the {RANKS[-1]} that vLLM takes.")
        return fitting[0]

    def weights(self, prompt: str) -> dict[str, float]:
        """The attention of a prompt, rounded so that its sum stays 1; empty if no task claims it."""
        exact = self.served.weights(prompt)
        if self.decimals is None or not exact:
            return exact
        rounded = {name: round(weight, self.decimals) for name, weight in exact.items()}
        lead = max(rounded, key=lambda name: exact[name])
        rounded[lead] = round(rounded[lead] + 1.0 - sum(rounded.values()), 9)
        return rounded

    def adapter(self, prompt: str) -> Adapter | None:
        """The LoRA that answers ``prompt`` as the pool does; None where that is the base model itself."""
        weights = self.weights(prompt)
        if not weights:
            return None
        key = hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:16]
        if key not in self.known:
            self.made += 1
            folder = self.folder / key
            self.served.model.export_mixture(weights, folder)
            self.known[key] = Adapter(f"mixture-{key}", self.made, folder, weights)
        self.known.move_to_end(key)
        while len(self.known) > self.keep:
            _, old = self.known.popitem(last=False)
            shutil.rmtree(old.folder)
        return self.known[key]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", type=Path, required=True, help="folder of a saved pool")
    parser.add_argument("--model", help="base model, in place of the one that the pool names")
    parser.add_argument("--prompts", type=Path, required=True, help="a file with one prompt a line")
    parser.add_argument("--adapters", type=Path, default=Path("mixtures"), help="folder for the LoRAs")
    parser.add_argument("--exact", action="store_true", help="do not round weights to two decimals")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--dry-run", action="store_true", help="build the LoRAs and print the requests, without vLLM")
    args = parser.parse_args()
    served = Served(args.pool, args.model)
    prompts = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    mixtures = Mixtures(served, args.adapters, keep=len(prompts), decimals=None if args.exact else 2)
    adapters = [mixtures.adapter(prompt) for prompt in prompts]
    if args.dry_run:
        for prompt, adapter in zip(prompts, adapters, strict=True):
            folder, weights = (str(adapter.folder), adapter.weights) if adapter else (None, {})
            print(json.dumps({"prompt": prompt, "lora": folder, "weights": weights}))
        return 0

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        served.model.get_base_model().name_or_path,
        enable_lora=True,
        max_lora_rank=mixtures.max_rank,
        max_loras=max(1, min(8, len({adapter.name for adapter in adapters if adapter}))),
    )
    requests = [None if a is None else LoRARequest(a.name, a.number, str(a.folder)) for a in adapters]
    # as tokens, so that vLLM reads what the pool's attention has read and adds none of its own
    read = [{"prompt_token_ids": served.encode(prompt)["input_ids"][0].tolist()} for prompt in prompts]
    sampling = SamplingParams(temperature=0.0, max_tokens=args.max_new_tokens)
    for prompt, output in zip(prompts, engine.generate(read, sampling, lora_request=requests), strict=True):
        print(f"{prompt}\n  -> {output.outputs[0].text.strip()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
