"""How the attention weights of a forward are found and travel to the layers.

Every caller (PEFT's classes, ``generate``, pipelines, a direct call of the base model) goes through the ``__call__``
of the base model, or of the encoder where ``generate`` runs it alone. Forward hooks there decide, in this order:
weights or a task given by the caller, those of the generation under way, those kept with a non-empty cache, those kept
with encoder outputs, and otherwise the shared attention on this forward's prompt tokens.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .attention import SharedAttention, max_pool
from .errors import PromptError, TaskError, WeightsError
from .ops import rank_gates
from .prompt_mask import before_labels, check_rows, inferred_mask, refuse_packed
from .weights import check_weights, one_hot, spread

SAPT_ARGUMENTS = ("sapt_task", "sapt_weights", "sapt_prompt_mask")
KEPT = "_sapt_weights"  # attribute on a cache or on encoder outputs: (adapter, weights [B, T])
SEEN_ROWS = 512  # rows whose pooled prompts are remembered for commit_task() without inputs


class Routing(threading.local):
    """The weights of the forward under way, shared by all layers; each thread has its own, copies start empty."""

    def __init__(self) -> None:
        self.adapter: str | None = None
        self.weights: Tensor | None = None  # [B, T]
        self.gates: Tensor | None = None  # [B, R]
        self.owner: nn.Module | None = None  # the module whose forward they belong to
        self.session: Tensor | None = None  # [B, T], while generate() runs
        self.seen: dict[str, list[Tensor]] = {}  # by adapter: pooled prompts [b, d] of its current task's training

    def __deepcopy__(self, memo: dict[int, Any]) -> Routing:
        memo[id(self)] = fresh = Routing()
        return fresh

    def __reduce__(self) -> tuple[type[Routing], tuple[()]]:
        return Routing, ()

    def clear(self) -> None:
        self.adapter = self.weights = self.gates = self.owner = None


class PromptRouter:
    """Computes the weights of each forward of ``base`` and hands them to the layers through ``routing``."""

    def __init__(self, attention: SharedAttention, routing: Routing) -> None:
        self.attention = attention
        self.routing = routing
        self.handles: list[Any] = []
        self.base: nn.Module | None = None
        self.warned = False

    def attach(self, base: nn.Module) -> None:
        """Register the hooks on ``base`` and on its encoder, if it is an encoder-decoder."""
        self.base, points = base, [base]
        if is_encoder_decoder(base):
            points.append(base.get_encoder())  # type: ignore[operator]
        for module in points:
            self.handles.append(module.register_forward_pre_hook(self.before, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self.after, always_call=True))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def active(self) -> str | None:
        """The adapter that routes now, or None if adapters are disabled or the active one is not a pool."""
        if self.attention.disable_adapters:
            return None
        return next((a for a in self.attention.active_adapters if self.attention.holds(a)), None)

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        given = {name: kwargs.pop(name) for name in SAPT_ARGUMENTS if name in kwargs}
        adapter = self.active()
        inside = self.routing.weights is not None and module is not self.base  # an encoder in a routed forward
        if adapter is None or inside:
            return (args, kwargs) if given else None
        self.routing.clear()  # an interrupted forward (KeyboardInterrupt) leaves its weights behind
        inputs = {**named_arguments(module, args), **kwargs, **given}
        weights = self.weights_for(module, adapter, inputs)
        self.use(adapter, weights)
        self.routing.owner = module
        return args, kwargs

    def use(self, adapter: str, weights: Tensor) -> None:
        config = self.attention.configs[adapter]
        gates = rank_gates(weights, config.scalings, config.task_ranks or [])
        self.routing.adapter, self.routing.weights, self.routing.gates = adapter, weights, gates

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        routing = self.routing
        if routing.weights is None or routing.owner is not module:
            return
        kept = (routing.adapter, routing.weights)
        cache = getattr(output, "past_key_values", None)
        if cache is not None and not isinstance(cache, tuple):
            setattr(cache, KEPT, (routing.adapter, routing.weights.detach()))
        elif hasattr(output, "last_hidden_state") and not hasattr(output, "logits"):
            setattr(output, KEPT, kept)
        routing.clear()

    def weights_for(self, module: nn.Module, adapter: str, inputs: dict[str, Any]) -> Tensor:
        """Attention weights [B, T], float32, of one forward of ``module``."""
        tasks = self.attention.configs[adapter].tasks or []
        batch = batch_of(inputs)
        if inputs.get("sapt_weights") is not None or inputs.get("sapt_task") is not None:
            weights = self.given_weights(adapter, inputs, batch, self.attention.weight.device)
            self.check_trainable(inputs, adapter, module)
            return weights
        if self.routing.session is not None:
            return spread(self.routing.session, batch, "this generation")
        cache = inputs.get("past_key_values")
        if cache is not None and hasattr(cache, "get_seq_length") and int(cache.get_seq_length()) > 0:
            return self.kept_weights(cache, adapter, len(tasks), batch, "past_key_values")
        encoded = inputs.get("encoder_outputs")
        if encoded is not None:
            return self.kept_weights(encoded, adapter, len(tasks), batch, "encoder_outputs")
        return self.computed_weights(module, adapter, inputs)

    def given_weights(self, adapter: str, inputs: dict[str, Any], batch: int, device: torch.device) -> Tensor:
        tasks = self.attention.configs[adapter].tasks or []
        if inputs.get("sapt_task") is not None:
            if inputs.get("sapt_weights") is not None:
                raise WeightsError("sapt_task and sapt_weights are both given: pass one of them.")
            return one_hot(inputs["sapt_task"], tasks, batch, device)
        return check_weights(inputs["sapt_weights"], tasks, batch, device)

    def check_trainable(self, inputs: dict[str, Any], adapter: str, module: nn.Module) -> None:
        names = inputs.get("sapt_task")
        if names is None or not (module.training and torch.is_grad_enabled()):
            return
        newest = (self.attention.configs[adapter].tasks or [])[-1]
        other = {names} if isinstance(names, str) else set(names)
        if other - {newest}:
            raise TaskError(
                f"Training on task {sorted(other - {newest})} is refused: its block is frozen, only the current task "
                f"{newest!r} trains. Use model.add_task(...) for new data, or model.eval() to ask for an answer."
            )

    def kept_weights(self, holder: Any, adapter: str, count: int, batch: int, what: str) -> Tensor:
        kept = getattr(holder, KEPT, None)
        if kept is None or kept[0] != adapter or kept[1].shape[-1] != count:
            raise WeightsError(
                f"{what} was given, but it carries no attention weights of the active pool ({count} tasks), and the "
                "prompt itself is not in this call. Produce it with this model and pool, or pass sapt_weights=[B, T] "
                "or sapt_task=name."
            )
        return spread(kept[1], batch, what)

    def computed_weights(self, module: nn.Module, adapter: str, inputs: dict[str, Any]) -> Tensor:
        training = module.training and torch.is_grad_enabled()
        refuse_packed(inputs)
        embeddings, mask = self.prompt_of(module, inputs)
        pooled = self.pool(module, adapter, inputs, embeddings, mask)  # [B, d]
        if training:
            self.remember(pooled, adapter)
        return self.attend(pooled, adapter)

    def attend(self, pooled: Tensor, adapter: str) -> Tensor:
        """Pooled prompts [B, d] -> weights [B, T]; uniform for a row without any prompt token."""
        empty = pooled.isnan().any(dim=1, keepdim=True)
        weights = self.attention.log_weights(pooled.masked_fill(empty, 0.0), adapter).exp()
        return torch.where(empty, torch.full_like(weights, 1 / weights.shape[1]), weights)

    def prompt_of(self, module: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Token embeddings [B, S, d] and the prompt's positions [B, S]."""
        ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if ids is None and embeddings is None:
            raise PromptError("Neither input_ids nor inputs_embeds is given: the attention needs the prompt.")
        shape = ids.shape if ids is not None else embeddings.shape[:2]  # type: ignore[union-attr]
        mask = inputs.get("sapt_prompt_mask")
        if mask is not None:
            if tuple(mask.shape) != tuple(shape):
                raise PromptError(f"sapt_prompt_mask has shape {list(mask.shape)}, the input is {list(shape)}.")
            mask = mask.bool()
        else:
            mask = self.prompt_mask(module, inputs, shape)
        check_rows(mask, module.training and torch.is_grad_enabled())
        if embeddings is None:
            with torch.no_grad():
                embeddings = module.get_input_embeddings()(ids)  # type: ignore[operator]
        return embeddings.detach(), mask

    def prompt_mask(self, module: nn.Module, inputs: dict[str, Any], shape: torch.Size) -> Tensor:
        ids, mask, labels = inputs.get("input_ids"), inputs.get("attention_mask"), inputs.get("labels")
        config = getattr(module, "config", None)
        if mask is not None and mask.dim() != 2:
            raise PromptError(
                f"attention_mask has {mask.dim()} dimensions, so the prompt cannot be read from it: "
                "pass sapt_prompt_mask=[B, S]."
            )
        if mask is not None:
            mask = mask.bool()
        elif ids is not None:
            mask = inferred_mask(ids, getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None))
        else:
            mask = torch.ones(shape, dtype=torch.bool, device=inputs["inputs_embeds"].device)
        if is_encoder_decoder(module) or self.task_type() not in (None, "CAUSAL_LM"):
            return mask
        if labels is not None and labels.shape == mask.shape:
            return before_labels(mask, labels)
        if labels is None and module.training and torch.is_grad_enabled() and not self.warned:
            self.warned = True
            warnings.warn(
                "Training without labels in the model call (label smoothing, compute_loss_func, a loss of your own): "
                "the whole row counts as prompt, answer included. Pass sapt_prompt_mask=[B, S] to mark the prompt.",
                stacklevel=2,
            )
        return mask

    def task_type(self) -> str | None:
        adapter = self.active()
        return None if adapter is None else self.attention.configs[adapter].task_type

    def pool(
        self, module: nn.Module, adapter: str, inputs: dict[str, Any], embeddings: Tensor, mask: Tensor
    ) -> Tensor:
        pooled = max_pool(embeddings, mask)
        if not self.attention.configs[adapter].pool_padding:
            return pooled
        return with_padding(module, pooled, mask, inputs)

    def remember(self, pooled: Tensor, adapter: str) -> None:
        seen = self.routing.seen.setdefault(adapter, [])
        count = sum(len(rows) for rows in seen)
        if count < SEEN_ROWS:
            seen.append(pooled[: SEEN_ROWS - count].detach().clone())


def with_padding(module: nn.Module, pooled: Tensor, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Let the pad embedding take part in the max of each row that the release would pad, as it does (pool_padding).

    The release pads the prompts of a batch to the longest one; with labels in the same row (decoder-only training) its
    collator does so on the prompts alone.
    """
    pad = getattr(getattr(module, "config", None), "pad_token_id", None)
    if pad is None:
        raise PromptError("pool_padding=True needs a pad_token_id in the model's config.")
    lengths = mask.sum(dim=1)  # [B]
    cut = inputs.get("labels") is not None or inputs.get("sapt_prompt_mask") is not None
    width = int(lengths.max()) if cut and not is_encoder_decoder(module) else mask.shape[1]
    with torch.no_grad():
        table = module.get_input_embeddings()  # type: ignore[operator]
        pad_embedding = table(torch.tensor([pad], device=mask.device)).float()  # [1, d]
    padded = torch.maximum(pooled, pad_embedding)
    return torch.where((lengths < width).unsqueeze(1), padded, pooled)


def is_encoder_decoder(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False)) and hasattr(
        module, "get_encoder"
    )


def named_arguments(module: nn.Module, args: tuple) -> dict[str, Any]:
    """The positional arguments of a call of ``module`` by their names."""
    if not args:
        return {}
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False))


def batch_of(inputs: dict[str, Any]) -> int:
    """Rows of this forward; for an encoder-decoder fed with encoder outputs, those of the decoder."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels"):
        if isinstance(inputs.get(name), Tensor):
            return int(inputs[name].shape[0])
    encoded = inputs.get("encoder_outputs")
    if encoded is not None:
        return int(encoded[0].shape[0])
    raise PromptError("Neither input_ids nor inputs_embeds is given: the attention needs the prompt.")
