"""What PEFT asks of a tuner to save and load an adapter: the manifest goes in, and is checked on the way back."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .config import SaptConfig
from .errors import OtherBaseError, PoolFormatError
from .fingerprint import checked, differing, fingerprint
from .hub import keep_card
from .manifest import MANIFEST, plain_name, read_manifest
from .overrides import accepted
from .pool_io import build_manifest, check_finite, check_loaded
from .stored_attention import stored_attention


class PoolSaving(BaseTuner):
    """The state-dict hooks of [`SaptModel`]."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SaptConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        keep_card(model)
        state = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        named = {cls._remove_adapter_name_from_key(key, adapter_name): tensor for key, tensor in state.items()}
        named |= {key: state_dict[here] for key, here in head_keys(model, adapter_name).items() if here in state_dict}
        targets_key, targets = next((k, v) for k, v in state.items() if ".sapt_targets." in k)
        manifest_key = targets_key.rsplit("sapt_targets", 1)[0] + f"{MANIFEST}.{adapter_name}"
        committed = (targets.sum(dim=1) > 0).tolist()
        manifest = build_manifest(config, committed, named, fingerprint(model), stored_attention(config, named))
        return {**state, manifest_key: manifest}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SaptConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        manifest = next((key for key in state_dict if key.endswith(MANIFEST)), None)
        if manifest is None:
            raise PoolFormatError(
                "The weights have no manifest, so they are not a whole pool as save_pretrained or "
                "get_peft_model_state_dict write it."
            )
        values = read_manifest(state_dict[manifest])
        own = {key: tensor for key, tensor in state_dict.items() if ".sapt_" in key and key != manifest}
        own |= {key: state_dict[here] for key, here in head_keys(model, adapter_name).items() if here in state_dict}
        check_loaded(values, config, own)
        check_finite(state_dict)  # of embeddings too, which PEFT adds to the file after the manifest is made
        check_base(values, model, {plain_name(key) for key in state_dict if ".sapt_" not in key})
        rest = {key: tensor for key, tensor in state_dict.items() if key != manifest}
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, rest)
        keep_number_types(model, renamed)
        attention: Any = getattr(model, "shared_attention", None)
        if attention is not None:
            attention.loaded.add(adapter_name)
        return renamed


def head_keys(model: nn.Module, adapter: str) -> dict[str, str]:
    """Names of the tensors in modules_to_save: as they are in the file -> as they are in the model's state."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            where = name.removeprefix("_fsdp_wrapped_module.")
            known = module.adapter_state_dict_load_map(adapter)
            found |= {f"{where}.{key}": f"{where}.{inner}" for key, inner in known.items()}
    return found


def check_base(manifest: dict[str, Any], model: nn.Module, brought: set[str]) -> None:
    """Refuse a base model whose numbers are not those in ``manifest``, but for tensors that the file has ``brought``;
    pools without a fingerprint are not refused."""
    other = differing(checked(manifest.get("base", {})), model, brought)
    if other is not None and not accepted("other_base"):
        raise OtherBaseError(
            f"The pool was made for another base model: {other!r} has other values here, so its blocks would answer "
            "nonsense. Load the model named in the pool's adapter_config.json, or accept this one with "
            "`with peft_sapt.accept('other_base'):`."
        )


def keep_number_types(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Widen parameters that would round what is about to be loaded: frozen blocks are never rounded."""
    parameters = dict(model.named_parameters())
    for key, tensor in state_dict.items():
        parameter = parameters.get(key)
        if parameter is not None and ".sapt_" in key:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, tensor.dtype))
