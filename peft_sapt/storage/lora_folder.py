"""A folder that holds one plain LoRA adapter: written for PEFT and LoRA servers, read back as factors per module."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..errors import LoraFolderError, SaptError
from ..version import METHOD
from .atomic import config_text, read_bounded, write_atomically

MAX_ALPHA = 1e9  # far beyond any in use; larger ones overflow float32 with the factors
KEY = "base_model.model.{module}.{part}.weight"
Factors = dict[str, tuple[Tensor, Tensor]]  # module name -> A [r, in], B [out, r]

# LoRA variants whose result is not base + scaling * B A x, by config field: the value that means "not in use"
VARIANTS: dict[str, Any] = {
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "modules_to_save": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "monteclora_config": None,
    "kasa_config": None,
    "corda_config": None,
    "loftq_config": None,
    "lora_ga_config": None,
}
# ways to start a LoRA that leave the base model as it is; others (PiSSA, OLoRA, ...) subtract their start from it
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass
class LoraFolder:
    """One LoRA of one rank: ``factors`` by module name, and its scaling lora_alpha / r (or / sqrt(r))."""

    factors: Factors
    r: int
    scaling: float


def write_lora(
    folder: str | os.PathLike, config: LoraConfig, factors: Factors, extra: dict[str, Tensor] | None = None
) -> None:
    """Write weights, then config, each by rename. ``extra`` are full tensors (heads) by their PEFT names.

    Raises:
        LoraFolderError: ``folder`` is a file, or holds a pool.
        OSError: it cannot be written.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in (extra or {}).items()}
    for module, (a, b) in factors.items():
        state[KEY.format(module=module, part="lora_A")] = a.detach().cpu().contiguous()
        state[KEY.format(module=module, part="lora_B")] = b.detach().cpu().contiguous()
    write_adapter(folder, config, state, "LoRA adapter", LoraFolderError)


def write_adapter(
    folder: str | os.PathLike, config: PeftConfig, state: dict[str, Tensor], what: str, error: type[SaptError]
) -> None:
    """Write a plain adapter of PEFT, weights, then config, each by rename.

    Raises:
        SaptError: an ``error`` that says ``what`` cannot go there: ``folder`` is a file, or holds a pool.
        OSError: it cannot be written.
    """
    target = Path(folder)
    if target.is_file():
        raise error(f"{target} is a file: give a folder for the {what}.")
    if holds_a_pool(target / CONFIG_NAME):
        raise error(f"{target} holds a SAPT pool, which this would overwrite: give another folder.")
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / SAFETENSORS_WEIGHTS_NAME, save(state, metadata={"format": "pt"}))
    write_atomically(target / CONFIG_NAME, config_text(config.to_dict()))


def read_lora(folder: str | os.PathLike) -> LoraFolder:
    """Read a LoRA adapter that PEFT saved as safetensors.

    Raises:
        LoraFolderError: a file is missing or damaged, or the adapter is a variant that a block cannot express (DoRA,
            biases, several ranks or alphas, adapted embeddings, saved modules).
    """
    config = _read_config(Path(folder) / CONFIG_NAME)
    weights = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise LoraFolderError(f"{weights} is missing: a LoRA is imported from safetensors only, never from a pickle.")
    try:
        state = load(weights.read_bytes())
    except SafetensorError as error:
        raise LoraFolderError(f"{weights} is not a readable safetensors file ({error}).") from error
    factors: Factors = {}
    prefix, left = KEY.split("{module}")[0], dict(state)
    for name in state:
        module = name.removeprefix(prefix).removesuffix(".lora_A.weight")
        if name != KEY.format(module=module, part="lora_A"):
            continue
        other = KEY.format(module=module, part="lora_B")
        if other not in left:
            raise LoraFolderError(f"{weights} has {name} but no {other}.")
        factors[module] = (left.pop(name), left.pop(other))
    if left:
        raise LoraFolderError(f"{weights} holds {sorted(left)[:3]}, which a LoRA block has no place for.")
    if not factors:
        raise LoraFolderError(f"{weights} holds no LoRA weights.")
    ranks = set()
    for module, (a, b) in factors.items():
        if a.dim() != 2 or b.dim() != 2 or not (a.is_floating_point() and b.is_floating_point()):
            raise LoraFolderError(f"{weights} has factors at {module} that are no matrices of floating point numbers.")
        if not all(bool(factor.float().isfinite().all()) for factor in (a, b)):
            raise LoraFolderError(f"{weights} holds NaN or infinity at {module}, in float32.")
        ranks |= {a.shape[0], b.shape[1]}
    if len(ranks) > 1 or 0 in ranks:
        raise LoraFolderError(f"{weights} has blocks of ranks {sorted(ranks)}; a task's block has one rank, above 0.")
    r = ranks.pop()
    alpha = config["lora_alpha"]
    return LoraFolder(factors, r, alpha / r**0.5 if config.get("use_rslora") else alpha / r)


def holds_a_pool(path: Path) -> bool:
    """Whether the config file ``path`` is that of a pool."""
    try:
        return f'"peft_type": "{METHOD}"' in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_bounded(path))
    except FileNotFoundError:
        raise LoraFolderError(f"{path} is missing: give the folder of a saved LoRA adapter.") from None
    except (RecursionError, ValueError) as error:  # not JSON, not UTF-8, nested without end, a number without end
        raise LoraFolderError(f"{path} is not JSON ({error}).") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise LoraFolderError(f"{path} describes {found!r}, not a LORA adapter.")
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, (int, float)) or not 0 < alpha < MAX_ALPHA:
        raise LoraFolderError(f"{path} has lora_alpha {str(alpha)[:40]}, expected a number between 0 and {MAX_ALPHA}.")
    used = [name for name, off in VARIANTS.items() if config.get(name) not in (off, None, [], {})]
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        raise LoraFolderError(
            f"{path} says init_lora_weights={config['init_lora_weights']!r}, which changes the base model too. "
            "Convert it with PEFT: save_pretrained(folder, path_initial_model_for_weight_conversion=...)."
        )
    used += [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    if used:
        raise LoraFolderError(
            f"{path} uses {used}, which a block of a pool cannot express. Retrain it as plain LoRA, or keep it as an "
            "adapter of its own."
        )
    return config
