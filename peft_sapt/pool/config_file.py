"""Reading and writing adapter_config.json: atomically, bounded, and never against the weights file beside it."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..compat import UNASKED, installed
from ..config import FOLLOWED, OPTIONS, SaptConfig
from ..errors import ConfigFileError, PickleError, SaptError, SaveError, VersionError
from ..hub.card import clean_card, write_card
from ..hub.card_text import is_hub_like
from ..storage.atomic import config_text, share, write_atomically
from ..storage.manifest import manifest_of, names_in, other_fields

MAX_CONFIG = 8 * 2**20  # bytes
RUNTIME = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")  # of a load
C = TypeVar("C", bound=SaptConfig)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_values(path: str | os.PathLike) -> dict[str, Any]:
    """The values in a config's file; raises [`ConfigFileError`] if it is too large or not a JSON object."""
    size = os.path.getsize(path)
    if size > MAX_CONFIG:
        raise ConfigFileError(f"{path} has {size} bytes, more than the {MAX_CONFIG} of any pool's.")
    try:
        values = json.loads(Path(path).read_bytes())
    except (RecursionError, ValueError) as error:
        raise ConfigFileError(f"{path} is not JSON ({error}). Load an intact copy.") from error
    if not isinstance(values, dict):
        raise ConfigFileError(f"{path} holds a {type(values).__name__}, not a pool's configuration.")
    values.pop("runtime_config", None)
    return values


def load_config(
    cls: type[C],
    read: Callable[..., Any],
    name_or_path: str | os.PathLike,
    subfolder: str | None,
    kwargs: dict[str, Any],
) -> C:
    """The config saved in a folder or on the Hub, as [`SaptConfig.from_pretrained`] says.

    Args:
        read: PEFT's own reading, ``PeftConfig.from_pretrained`` bound to ``cls``.
    """
    folder = Path(name_or_path, subfolder or "")
    if not folder.is_dir():
        folder = snapshot(str(name_or_path), subfolder, hub_arguments(kwargs))
    manifest = manifest_in(folder) if folder.is_dir() else None
    options = {name: kwargs.pop(name) for name in [*kwargs] if name in cls.__annotations__}
    try:
        config = read(str(name_or_path), subfolder, **kwargs)
    except SaptError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if not (folder / CONFIG_NAME).is_file() or "missing required keys" in str(error):
            raise  # PEFT says that there is none, or that it is no adapter's
        raise ConfigFileError(f"{folder / CONFIG_NAME} does not describe a pool ({error}).") from error
    if not isinstance(config, cls):
        raise ConfigFileError(f"{folder / CONFIG_NAME} describes a {config.peft_type} adapter, not a pool.")
    if manifest is not None:
        config = reconciled(config, manifest, folder)
        tell_of_scales(config, manifest, folder)
        refuse_more_than(config, os.path.getsize(folder / SAFETENSORS_WEIGHTS_NAME), folder)
    return with_options(config, options, str(name_or_path))


def tell_of_scales(config: SaptConfig, manifest: dict[str, Any], folder: Path) -> None:
    """Say that a rank or alpha which was changed in a file does nothing to the blocks that are there."""
    saved = manifest.get("config")
    for name in ("r", "lora_alpha") if isinstance(saved, dict) else ():
        if name in saved and saved[name] != getattr(config, name):  # type: ignore[operator, index]  # a dict, as just seen
            warnings.warn(
                f"{name}={getattr(config, name)!r} in {folder / CONFIG_NAME} counts for tasks that are added from now "
                "on: the blocks that are there keep their own. Scale a block by sapt_weights, or by export_mixture.",
                stacklevel=5,
            )


def with_options(config: C, options: dict[str, Any], where: str) -> C:
    """``config`` with options that a caller gave when loading the pool in ``where``.

    Raises:
        SaptError: one of them is fixed by what is saved, or out of its range.
    """
    for name, value in options.items():
        if name not in (*OPTIONS, "lora_dropout") and getattr(config, name) != value:
            raise SaptError(
                f"{name}={value!r} was given for the pool in {where}, which was saved with {getattr(config, name)!r}: "
                f"only {', '.join(OPTIONS)} and lora_dropout can be chosen when a pool is loaded."
            )
        setattr(config, name, value)
    config.check_ranges()
    return config


def reconciled(config: C, manifest: dict[str, Any], folder: Path) -> C:
    """``config`` if it was saved together with the weights that ``manifest`` describes, else theirs."""
    saved = manifest.get("config")
    if not isinstance(saved, dict) or manifest.get("save_id") == config.save_id:
        return config
    if config.save_id is None and not other_fields(manifest, described(config)):
        return config  # it was written before the weights, as transformers does
    warnings.warn(
        f"{folder / CONFIG_NAME} is of another save than {SAFETENSORS_WEIGHTS_NAME} beside it: the weights "
        "decide. Save the pool again to bring them together.",
        stacklevel=5,
    )
    kept = {name: getattr(config, name) for name in RUNTIME if hasattr(config, name)}
    try:
        return type(config)(**{**saved, **kept, "save_id": manifest.get("save_id")})
    except SaptError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigFileError(f"The weights file in {folder} does not describe a pool ({error}).") from error


def refuse_more_than(config: SaptConfig, size: int, folder: Path) -> None:
    """Raises [`ConfigFileError`] if a pool as described could not fit into a weights file of ``size`` bytes.

    Building it would exhaust memory before the weights, which tell the truth, are looked at.
    """
    each = config.num_virtual_tokens + config.statistics_rank
    rows = sum(config.task_ranks) + sum(config.replay_rows) + sum(config.background_rows) + each * len(config.tasks)
    if rows + config.query_dim > size or max(config.token_dim or 0, config.feature_dim or 0) > size:
        raise ConfigFileError(
            f"{folder / CONFIG_NAME} describes more than {SAFETENSORS_WEIGHTS_NAME} of {size} bytes can hold. "
            "One of both was damaged or edited: load an intact copy."
        )


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of a load's arguments that say where on the Hub, and how, PEFT is about to download."""
    known = inspect.signature(hf_hub_download).parameters
    return {name: value for name, value in kwargs.items() if name in known}


def snapshot(repo_id: str, subfolder: str | None, hub: dict[str, Any]) -> Path:
    """Where the Hub's cache has the pool of ``repo_id``, downloaded as PEFT is about to; a path that is not there if
    the Hub cannot be asked, about which PEFT then speaks.

    Raises:
        PickleError: the repository has the weights as a pickle alone.
    """
    asked = {"repo_id": repo_id, "subfolder": subfolder, **hub}
    try:
        hf_hub_download(**asked, filename=CONFIG_NAME)
    except (OSError, ValueError, HfHubHTTPError):
        return Path(repo_id)
    try:
        return Path(hf_hub_download(**asked, filename=SAFETENSORS_WEIGHTS_NAME)).parent
    except EntryNotFoundError:
        raise PickleError(
            f"{repo_id} has no {SAFETENSORS_WEIGHTS_NAME}; weights in a pickle, which can run code when it is read, "
            "are not loaded."
        ) from None
    except (OSError, ValueError, HfHubHTTPError):
        return Path(repo_id)


def manifest_in(folder: Path) -> dict[str, Any] | None:
    """The manifest of the pool saved in ``folder``; None if there are no weights."""
    if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        return manifest_of(folder / SAFETENSORS_WEIGHTS_NAME)
    if (folder / WEIGHTS_NAME).is_file():
        raise PickleError(
            f"{folder} has its weights in {WEIGHTS_NAME}, a pickle, which can run code when it is read. Ask for "
            f"{SAFETENSORS_WEIGHTS_NAME}; pools are saved as that."
        )
    return None


# --- writing ---------------------------------------------------------------------------------------------------------


def pool_values(config: SaptConfig) -> dict[str, Any]:
    """The values that belong to a pool and not to one load of it, as JSON has them."""
    skipped = (*RUNTIME, "save_id")
    return {k: v for k, v in json.loads(config_text(config.to_dict())).items() if k not in skipped}


def save_config(
    config: SaptConfig, save_directory: str | os.PathLike, auto_mapping: dict[str, Any] | None = None
) -> None:
    """Write ``adapter_config.json``, as [`SaptConfig.save_pretrained`] says.

    PEFT calls this last, after the weights and the model card; so this is where the config learns which save it
    belongs to, the weights file gets the permissions of any other new file, and the card its section.
    """
    if os.path.isfile(save_directory):
        raise SaveError(f"{save_directory} is a file: save_pretrained needs a folder.")
    folder = Path(save_directory)
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    pickle = folder / WEIGHTS_NAME
    if pickle.exists() and not (weights.exists() and weights.stat().st_mtime_ns >= pickle.stat().st_mtime_ns):
        raise SaveError(
            f"{folder} holds {WEIGHTS_NAME}, a pickle, which no pool is loaded from: remove it, and save without "
            "safe_serialization=False."
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_id, structure = save_beside(config, weights)
    values = {**config.to_dict(), **structure, "save_id": save_id}
    if auto_mapping is not None:
        values["auto_mapping"] = auto_mapping
    base = values.get("base_model_name_or_path")
    if isinstance(base, str) and is_hub_like(base) and os.path.exists(base):
        values["base_model_name_or_path"] = os.path.join(os.curdir, base)  # else a Hub id wherever it is read
    write_atomically(folder / CONFIG_NAME, config_text(values))
    share(weights, like=folder / CONFIG_NAME)
    if (folder / "README.md").is_file():  # PEFT writes none on a worker process
        write_card(folder, values)
    else:
        clean_card(folder.parent / "README.md", values)  # PEFT's, above the folder of a named adapter


def save_beside(config: SaptConfig, weights: Path) -> tuple[str | None, dict[str, Any]]:
    """Which save the weights file is of, and what a config beside it must say of the pool in it.

    That is so if they were just written for this config's pool, whatever became of its user's object, or hold the
    tasks that it describes; otherwise None. Without any weights it is what the config says itself. Options such as
    ``top_k`` may differ: whoever writes them beside weights means them.

    Raises:
        VersionError: the weights have no manifest, since PEFT did not ask for one.
    """
    if not weights.is_file():
        return config.save_id, {}
    try:
        manifest = manifest_of(weights)
    except SaptError:  # damaged, of an older save: a load will say so
        return None, {}
    if manifest is None and any(".sapt_" in name for name in names_in(weights)):
        raise VersionError(UNASKED.format(what=f"written {weights} without a pool's manifest", versions=installed()))
    if manifest is None:  # another adapter's, which transformers is about to replace
        return config.save_id, {}
    save_id, saved, free = manifest.get("save_id"), manifest.get("config"), (*FOLLOWED, *RUNTIME, "lora_dropout")
    if save_id is None or (save_id != config.saved_with and other_fields(manifest, described(config))):
        return None, {}
    return save_id, {k: v for k, v in saved.items() if k not in free} if isinstance(saved, dict) else {}


def described(config: SaptConfig) -> dict[str, Any]:
    """What a weights file must hold to fit a pool."""
    return {
        "tasks": config.tasks,
        "ranks": config.task_ranks,
        "scalings": config.scalings,
        "replay_rows": config.replay_rows,
        "token_dim": config.token_dim,
    }
