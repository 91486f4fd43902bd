"""A folder that holds one soft prompt as PEFT's prompt tuning saves it: written, and read back."""

from __future__ import annotations

import json
import os
from pathlib import Path

from peft import PromptTuningConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..errors import PromptFolderError
from .atomic import read_bounded
from .lora_folder import write_adapter

KEY = "prompt_embeddings"


def write_prompt(folder: str | os.PathLike, prompt: Tensor, task_type: str | None, base: str | None) -> None:
    """Write ``prompt`` [P, d] as a prompt-tuning adapter of PEFT: weights, then config, each by rename.

    Args:
        base: name or path of the base model, if it is known.

    Raises:
        PromptFolderError: ``folder`` is a file, or holds a pool.
        OSError: it cannot be written.
    """
    config = PromptTuningConfig(
        task_type=task_type,
        base_model_name_or_path=base,
        num_virtual_tokens=len(prompt),
        token_dim=prompt.shape[1],
        num_transformer_submodules=1,
        inference_mode=True,
    )
    state = {KEY: prompt.detach().cpu().contiguous()}
    write_adapter(folder, config, state, "soft prompt", PromptFolderError)


def read_prompt(folder: str | os.PathLike, length: int, width: int) -> Tensor:
    """The soft prompt [``length``, ``width``] in a folder that PEFT's prompt tuning saved.

    Raises:
        PromptFolderError: a file is missing or damaged, it is another kind of adapter, or a prompt of another size.
    """
    path, weights = Path(folder) / CONFIG_NAME, Path(folder) / SAFETENSORS_WEIGHTS_NAME
    try:
        config = json.loads(read_bounded(path))
    except (OSError, RecursionError, ValueError) as error:
        raise PromptFolderError(f"{path} cannot be read ({error}): give the folder of a saved soft prompt.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if kind != "PROMPT_TUNING":
        raise PromptFolderError(f"{path} describes {kind!r}, not a PROMPT_TUNING adapter.")
    try:
        state = load(weights.read_bytes())
    except (OSError, SafetensorError) as error:
        raise PromptFolderError(f"{weights} is not a readable safetensors file ({error}).") from error
    prompt = state.get(KEY)
    if prompt is None or prompt.dim() != 2 or not prompt.is_floating_point():
        raise PromptFolderError(f"{weights} holds {sorted(state)[:3]}, not one matrix {KEY!r}.")
    if len(prompt) == length * 2 and config.get("num_transformer_submodules") == 2:
        prompt = prompt[:length]  # an encoder-decoder's file has a second prompt, which PEFT does not use either
    prompt = prompt.float()
    if tuple(prompt.shape) != (length, width):
        raise PromptFolderError(
            f"{weights} holds a prompt of {list(prompt.shape)}; this pool's have {[length, width]}: all prompts of a "
            "pool have one length (SaptConfig.num_virtual_tokens) and the width of the base model."
        )
    if not bool(prompt.isfinite().all()):
        raise PromptFolderError(f"{weights} holds NaN or infinity.")
    return prompt
