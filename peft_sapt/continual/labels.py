"""What the methods of the benchmark are called in tables."""

from __future__ import annotations

LABELS = {
    "base": "base model",
    "sequential": "sequential LoRA",
    "per-task": "one LoRA per task, known",
    "multi-task": "multi-task LoRA",
    "replay": "Replay",
    "o-lora": "O-LoRA",
    "epi": "EPI",
    "l2p": "L2P",
    "lfpt5": "LFPT5",
    "prog-prompt": "ProgPrompt",
    "prog-prompt-known": "ProgPrompt, task known",
    "sapt": "SAPT",
    "sapt-ridge": 'SAPT, `router="ridge"`',
    "sapt-paper": "SAPT, the paper's query and replay",
    "sapt-ridge-mean": 'SAPT, `router="ridge"`, mean embeddings',
    "sapt-real-rows": "SAPT, real rows replayed",
    "sapt-no-arm": "SAPT without ARM",
    "sapt-no-floor": "SAPT without the floor term",
    "sapt-official": "SAPT with the official ARM",
    "prompt-sequential": "sequential prompt tuning",
    "prompt-per-task": "one prompt per task, known",
    "sapt-prompt": 'SAPT-Prompt, `router="ridge"`',
    "sapt-prompt-learned": "SAPT-Prompt",
}
PROMPTS = {"l2p", "lfpt5", *(name for name in LABELS if "prompt" in name)}


def alone_of(method: str) -> str:
    """The method whose single-task scores FWT of ``method`` is measured against."""
    return "prompt-per-task" if method in PROMPTS else "per-task"
