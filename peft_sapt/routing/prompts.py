"""From the arguments of a forward to its pooled prompts: which tokens count, and one feature over their embeddings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import SaptConfig
from ..errors import OtherShapeError, PromptError, SaptError, WeightsError
from ..pool_module import input_embeddings, unshard
from .features import PromptReader
from .packing import require_prompts, segments_of, without_tail
from .prompt_mask import check_rows, is_encoder_decoder, prompt_mask_of


class Prompts(NamedTuple):
    """Prompts of a batch: ``pooled`` [N, d], NaN where a prompt is empty; ``mask`` [B, S], True on prompt tokens;
    ``segments`` [B, S], the prompt (0..N-1) that each token of a packed batch belongs to, else None and N = B."""

    pooled: Tensor
    mask: Tensor
    segments: Tensor | None


def read_prompts(
    module: nn.Module,
    config: SaptConfig,
    reader: PromptReader,
    inputs: dict[str, Any],
    training: bool,
    remember: bool = False,
) -> Prompts:
    """Pool the prompt tokens of ``inputs``, the arguments of a forward of ``module`` (the base model, or its encoder).

    Args:
        remember: the rows are training rows, which will come again.

    Raises:
        PromptError: no input, masks of another shape, an empty prompt in training, or packed rows for an
            encoder-decoder.
    """
    ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if ids is None and embeddings is None:
        raise PromptError(
            "Neither input_ids nor inputs_embeds is given, and the attention needs the prompt: give one of them, or "
            "sapt_weights=[B, T] or sapt_task=name."
        )
    shape = ids.shape if ids is not None else embeddings.shape[:2]  # type: ignore[union-attr]  # one of the two is there
    table = token_table(module) if embeddings is None else None
    segments = segments_of(inputs)
    if segments is not None and is_encoder_decoder(module):
        raise PromptError("Packed rows are not supported for encoder-decoder models: switch packing off.")
    mask = inputs.get("sapt_prompt_mask")
    if mask is None:
        mask = prompt_mask_of(module, config, inputs, shape, segments, training)
    elif tuple(mask.shape) != tuple(shape):
        raise PromptError(f"sapt_prompt_mask has shape {list(mask.shape)}, the input is {list(shape)}.")
    mask, labels = mask.bool(), inputs.get("labels")
    check_rows(mask, training)
    if segments is not None:
        if config.pool_padding:
            raise PromptError(
                "pool_padding=True reproduces the official code, which packs no rows: switch one of them off."
            )
        if inputs.get("attention_mask") is None:
            mask = without_tail(mask, segments, labels is not None)
        if training and labels is not None and labels.shape == mask.shape:
            require_prompts(mask, labels, segments)
    with torch.no_grad():  # hooks such as enable_input_require_grads must not pull the attention into their graph
        found = embeddings if table is None else look_up(table, ids)  # type: ignore[arg-type]  # one of the two is there
    embeddings = found.detach()  # type: ignore[union-attr]  # [B, S, d]
    pooled = reader.features(module, config, ids, embeddings, mask, segments, training or remember)  # [N, feature_dim]
    return Prompts(with_padding(module, pooled, mask, inputs) if config.pool_padding else pooled, mask, segments)


def token_table(module: nn.Module) -> nn.Module:
    """The module with the token embeddings of ``module``; raises [`PromptError`] if there are none to route by."""
    table = input_embeddings(module)
    if table is None:
        raise PromptError(
            f"A {type(module).__name__} gives no token embeddings to compute attention weights from: pass "
            "sapt_weights=[B, T] or sapt_task=name."
        )
    if any(p.device.type == "meta" for p in table.parameters()):
        raise PromptError(
            f"The token embeddings of this {type(module).__name__} are on the meta device, which holds no numbers: "
            "load the weights, with to_empty and load_state_dict, before it runs; if accelerate's cpu_offload or "
            "disk_offload has put them aside, keep the model in memory, or spread it over devices with device_map."
        )
    return table


def look_up(embedding: nn.Module, ids: Tensor) -> Tensor:
    """The plain embeddings of ``ids``, [B, S, d]: what inference reads, whatever training adds to them.

    Hooks on the module (NEFTune's noise, say) and its behaviour in train mode (dropout) are left out. Works outside a
    forward of a model that FSDP2 has sharded too.
    """
    bare = without_hooks(embedding)
    sharded = {name: unshard(p) for name, p in embedding.named_parameters() if hasattr(p, "full_tensor")}
    return torch.func.functional_call(bare, sharded, (ids,)) if sharded else bare(ids)


def without_hooks(module: nn.Module) -> nn.Module:
    """A shallow copy of ``module`` in eval mode, without hooks, on the same parameters; ``module`` stays as it is."""
    bare = object.__new__(type(module))  # copy.copy would pickle, which parametrized modules refuse
    vars(bare).update(vars(module))
    bare._parameters = dict(module._parameters)
    bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()
    bare._backward_hooks, bare._backward_pre_hooks = OrderedDict(), OrderedDict()
    bare.training = False
    bare._modules = {name: None if child is None else without_hooks(child) for name, child in module._modules.items()}
    return bare


def read_batches(
    module: nn.Module,
    config: SaptConfig,
    reader: PromptReader,
    batches: Iterable[Mapping[str, Any] | Tensor] | Mapping[str, Any] | Tensor,
    device: torch.device,
    tokens: list[list[int]] | None = None,
    remember: bool = False,
) -> Tensor:
    """Pooled prompts [N, d] of all rows in ``batches``, float32.

    Args:
        tokens: gets the token ids of the prompts, where batches have any.
        remember: as in [`read_prompts`].
        batches: arguments of a forward, as dicts or a single one, or prompts that are pooled already, [n, d].

    Raises:
        PromptError: as [`read_prompts`] says.
        WeightsError: a pooled tensor has another shape than [N, feature_dim].
    """
    found: list[Tensor] = []
    for batch in [batches] if isinstance(batches, (Mapping, Tensor)) else batches:
        if isinstance(batch, Tensor):
            pooled = batch
        else:
            inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
            with torch.no_grad():
                prompts = read_prompts(module, config, reader, inputs, training=False, remember=remember)
            pooled = prompts.pooled
            if prompts.segments is not None:
                pooled = pooled[~pooled[:, 0].isnan()]  # packed rows may end in padding
            if tokens is not None and inputs.get("input_ids") is not None:
                tokens += prompt_tokens(inputs["input_ids"], prompts)
        if pooled.dim() != 2 or pooled.shape[1] != config.feature_dim:
            raise WeightsError(f"Pooled prompts have shape {list(pooled.shape)}, not [N, {config.feature_dim}].")
        found.append(pooled.to(device))
    empty = torch.zeros(0, config.feature_dim or 0, device=device)
    return torch.cat(found) if found else empty


def prompt_tokens(input_ids: Tensor, prompts: Prompts) -> list[list[int]]:
    """Token ids of each non-empty prompt in ``prompts``, which was read from a batch with these ids."""
    if prompts.segments is None:
        rows = [ids[keep] for ids, keep in zip(input_ids, prompts.mask, strict=True)]
    else:
        numbers, ids = prompts.segments[prompts.mask], input_ids[prompts.mask]
        rows = [ids[numbers == n] for n in range(len(prompts.pooled))]
    return [row.tolist() for row in rows if len(row)]


def with_padding(module: nn.Module, pooled: Tensor, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Let the pad embedding take part in the max of each row that the official code would pad (pool_padding).

    It pads the prompts of a batch to the longest one; with labels in the same row (decoder-only training) its collator
    does so on the prompts alone.
    """
    pad = getattr(getattr(module, "config", None), "pad_token_id", None)
    if pad is None:
        raise PromptError("pool_padding=True needs a pad_token_id in the model's config.")
    lengths = mask.sum(dim=1)  # [B]
    cut = inputs.get("labels") is not None or inputs.get("sapt_prompt_mask") is not None
    width = int(lengths.max()) if cut and not is_encoder_decoder(module) else mask.shape[1]
    with torch.no_grad():
        pad_embedding = look_up(token_table(module), torch.tensor([pad], device=mask.device)).float()  # [1, d]
    padded = torch.maximum(pooled, pad_embedding)
    return torch.where((lengths < width).unsqueeze(1), padded, pooled)


def embedding_weight(model: nn.Module) -> Tensor | None:
    """Token embeddings [V, d] of the base model, if it has any."""
    embedding = input_embeddings(model)
    return getattr(embedding, "weight", None)


def checked_token_dim(wanted: int | None, embedding: Tensor | None) -> int:
    if embedding is None:
        if wanted is None:
            raise SaptError("The base model has no input embeddings: give SaptConfig(token_dim=...).")
        return wanted
    found = int(embedding.shape[-1])
    if wanted is not None and wanted != found:
        raise OtherShapeError(
            f"SaptConfig.token_dim is {wanted}, but this base model's token embeddings have width {found}: the "
            "pool was made for another base model. Load it onto that one."
        )
    return found
