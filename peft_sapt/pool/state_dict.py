"""What PEFT asks of a tuner to save and load an adapter: the manifest goes in, and is checked on the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..config import SaptConfig
from ..errors import OtherBaseError, PoolFormatError, SaptError
from ..routing.install import memory_on
from ..routing.memory import committed_in
from ..storage.fingerprint import checked, differing, fingerprint
from ..storage.manifest import build_manifest, check_finite, check_loaded, read_manifest
from ..storage.overrides import accepted
from ..storage.plain_file import MANIFEST, is_manifest, plain_name
from ..validation import checked_background
from .config_file import described, pool_values
from .stored_attention import stored_attention

ROUTED_BY = (
    "router",
    "block",
    "features",
    "features_layer",
    "query_activation",
    "temperature",
    "pool_padding",
)  # fields that no tensor shows


def with_manifest(
    model: nn.Module,
    config: SaptConfig,
    adapter: str,
    own: dict[str, Tensor],
    whole_state: Mapping[str, Tensor],
    file_name: Callable[[str, str], str],
) -> dict[str, Tensor]:
    """An adapter's state as it is saved: ``own``, and the manifest that describes it. Nothing of ``model`` changes.

    Args:
        own: what PEFT saves of the adapter, by the names in the model's state.
        whole_state: the model's state, in which its heads are.
        file_name: PEFT's rule from such a name and the adapter's to the name in a file.
    """
    shown, config = config, own_config(model, adapter, config)
    named = {file_name(key, adapter): tensor for key, tensor in own.items()}
    named |= {key: whole_state[here] for key, here in head_keys(model, adapter).items() if here in whole_state}
    targets_key, targets = next((k, v) for k, v in own.items() if ".sapt_targets." in k)
    manifest_key = targets_key.rsplit("sapt_targets", 1)[0] + f"{MANIFEST}.{adapter}"
    counts = next(v for k, v in own.items() if ".sapt_counts." in k)
    manifest = build_manifest(
        {**described(config), "committed": committed_in(targets), "statistics": prompts_in(counts)},
        pool_values(config),
        named,
        fingerprint(model),
        stored_attention(config, named),
    )
    shown.saved_with = read_manifest(manifest)["save_id"]  # for the file of this config, which PEFT writes next
    return {**own, manifest_key: manifest}


def prompts_in(counts: Tensor) -> list[int]:
    """Of how many prompts of each task there are statistics, by the counts [T, 3] of a pool; [] on the meta device."""
    return [] if counts.device.type == "meta" else [int(count) for count in counts[:, 0].tolist()]


def checked_state(
    model: nn.Module, config: SaptConfig, adapter: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a loaded file but its manifest, once everything that the manifest says holds.

    Raises:
        PoolFormatError: there is no manifest, or it does not fit; its subclasses name what is wrong.
    """
    manifest = next(filter(is_manifest, state_dict), None)
    if manifest is None:
        raise PoolFormatError(
            "The weights have no manifest, so they are not a whole pool as save_pretrained or "
            "get_peft_model_state_dict write it."
        )
    values, config = read_manifest(state_dict[manifest]), own_config(model, adapter, config)
    own = {key: tensor for key, tensor in state_dict.items() if ".sapt_" in key and key != manifest}
    own |= {key: state_dict[here] for key, here in head_keys(model, adapter).items() if here in state_dict}
    check_settings(values, config)
    check_loaded(values, described(config), own)
    check_finite(state_dict)  # of embeddings too, which PEFT adds to the file after the manifest is made
    check_base(values, model, {plain_name(key) for key in state_dict if ".sapt_" not in key})
    return {key: tensor for key, tensor in state_dict.items() if key != manifest}


@contextmanager
def room_for(model: nn.Module, adapter: str, state_dict: Mapping[str, Tensor]) -> Iterator[None]:
    """Hold as many prompts of no task as a checked file does, whose tensors come next; if these are refused inside,
    those of before again."""
    memory, manifest = memory_on(model), next(filter(is_manifest, state_dict))
    undo = None if memory is None or not memory.holds(adapter) else memory.hooks.statistics.snapshot(adapter)
    try:
        take_background(model, adapter, read_manifest(state_dict[manifest]))
        yield
    except PoolFormatError:
        if undo is not None:
            undo()
        raise


def take_background(model: nn.Module, adapter: str, manifest: Mapping[str, Any]) -> None:
    """Make room for as many prompts of no task as a file has: a pool that is built to go on with one has none yet.

    Raises:
        PoolFormatError: the manifest does not say how many.
    """
    memory, saved = memory_on(model), manifest.get("config")
    if memory is None or not memory.holds(adapter) or not isinstance(saved, dict):
        return
    try:
        rows, forms = checked_background(saved.get("background_rows"), saved.get("background_forms"))
    except SaptError as error:
        raise PoolFormatError(f"The pool's manifest is damaged: {error}") from error
    own = memory.hooks.config_of(adapter)
    if (rows, forms) != (own.background_rows, own.background_forms):
        memory.hooks.statistics.make_room(adapter, rows, forms)


def check_settings(manifest: Mapping[str, Any], config: SaptConfig) -> None:
    """Raises [`PoolFormatError`] if a setting that no tensor shows is another in a file than in its pool."""
    saved = manifest.get("config")
    if not isinstance(saved, dict):
        return
    for name in ROUTED_BY:
        if name in saved and saved[name] != getattr(config, name):
            raise PoolFormatError(
                f"The weights were saved with {name}={saved[name]!r}, the pool they are loaded into has "
                f"{getattr(config, name)!r}: prompts would be routed otherwise. Restore the adapter_config.json that "
                "was saved with them, or load with PeftModel.from_pretrained, which reads it."
            )


def check_places(model: nn.Module, adapter: str, renamed: Mapping[str, Tensor]) -> None:
    """Refuse a file whose tensors, by their names in ``model``, are not exactly those of the pool there.

    Raises:
        PoolFormatError: some have no place, some places stay empty, or a shape differs.
    """
    mark = f".{adapter}"
    here = {k: t for k, t in model.state_dict().items() if ".sapt_" in k and (f"{mark}." in k or k.endswith(mark))}
    given = {key: tensor for key, tensor in renamed.items() if ".sapt_" in key}
    homeless, empty = sorted(given.keys() - here.keys()), sorted(here.keys() - given.keys())
    if (homeless and not accepted("unknown_tensors")) or (empty and not accepted("missing_tensors")):
        shown = f"{empty[0]!r} is not in it" if empty else ""
        if homeless:
            shown = f"{homeless[0]!r} has no place in this {type(model).__name__}"
        raise PoolFormatError(
            f"The weights file does not fit the pool: {shown} ({len(homeless)} without a place, {len(empty)} places "
            "without weights). The pool was saved on another class of model (AutoModel in place of "
            "AutoModelForCausalLM, say), or with other target_modules or layers, router or block."
        )
    for key in given.keys() & here.keys():
        if given[key].shape != here[key].shape:
            raise PoolFormatError(
                f"The weights file does not fit the pool: {key!r} is {list(given[key].shape)} in it and "
                f"{list(here[key].shape)} here. Load it with the adapter_config.json that was saved with it."
            )


def own_config(model: nn.Module, adapter: str, shown: SaptConfig) -> SaptConfig:
    """The config that the pool itself has, where ``peft_config`` shows that of its user."""
    memory = memory_on(model)
    return memory.hooks.config_of(adapter) if memory is not None and memory.holds(adapter) else shown


def head_keys(model: nn.Module, adapter: str) -> dict[str, str]:
    """Names of the tensors in modules_to_save: as they are in the file -> as they are in the model's state."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            where = name.removeprefix("_fsdp_wrapped_module.")
            known = module.adapter_state_dict_load_map(adapter)
            found |= {f"{where}.{key}": f"{where}.{inner}" for key, inner in known.items()}
    return found


def check_base(manifest: Mapping[str, Any], model: nn.Module, brought: set[str]) -> None:
    """Refuse a base model whose numbers are not those in ``manifest``, but for tensors that the file has ``brought``;
    pools without a fingerprint are not refused."""
    other = differing(checked(manifest.get("base", {})), model, brought)
    if other is not None and not accepted("other_base"):
        raise OtherBaseError(
            f"The pool was made for another base model: {other!r} has other values here, so its blocks would answer "
            "nonsense. Load the model named in the pool's adapter_config.json, or accept this one with "
            "`with peft_sapt.accept('other_base'):`."
        )


def keep_dtypes(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Widen parameters that would round what is about to be loaded: frozen blocks are never rounded."""
    parameters = dict(model.named_parameters())
    for key, tensor in state_dict.items():
        parameter = parameters.get(key)
        if parameter is not None and ".sapt_" in key:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, tensor.dtype))
