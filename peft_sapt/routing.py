"""How the attention weights of a forward are found and travel to the layers.

Every caller (PEFT's classes, ``generate``, pipelines, a direct call of the base model) goes through the ``__call__``
of the base model, or of the encoder where ``generate`` runs it alone. Forward hooks there decide, in this order:
weights or a task given by the caller, those of the generation under way, those kept with a non-empty cache, those kept
with encoder outputs, and otherwise the shared attention on this forward's prompt tokens.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn

from .attention import SharedAttention
from .checkpointing import gate_checkpoints, ungate_checkpoints
from .errors import PromptError, SaptError, TaskError, WeightsError
from .mixture import Mixture, Stack
from .pool import seal_heads
from .pooling import is_encoder_decoder, read_prompts
from .soft_prompt import VIRTUAL, SoftPrompts, put_before, without_virtual
from .weights import check_weights, one_hot, select

SAPT_ARGUMENTS = ("sapt_task", "sapt_weights", "sapt_prompt_mask")
KEPT = "_sapt_mixture"  # attribute on a cache or on encoder outputs
SEEN_ROWS = 512  # rows whose pooled prompts are remembered for commit_task() without inputs


class Routing(threading.local):
    """The weights of the forward under way, shared by all layers; each thread has its own, copies start empty."""

    def __init__(self) -> None:
        self.mixture: Mixture | None = None
        self.weights: Tensor | None = None  # [B, T]
        self.gates: Tensor | None = None  # [B, R]
        self.owner: nn.Module | None = None  # the module whose forward they belong to
        self.cache: Any = None  # that this forward was given to fill
        self.longer: int | None = None  # positions that its logits have with virtual tokens, which are to be cut
        self.session: Mixture | None = None  # while generate() runs
        self.learned: dict[str, str | None] = {}  # by adapter: the task that its closed-form router is known to know
        self.stacks: dict[nn.Module, Stack] | None = None  # by layer, in a session, where no factor can change
        self.seen: dict[str, list[Tensor]] = {}  # by adapter: pooled prompts [b, d] of its current task's training

    def __deepcopy__(self, memo: dict[int, Any]) -> Routing:
        memo[id(self)] = fresh = Routing()
        return fresh

    def __reduce__(self) -> tuple[type[Routing], tuple[()]]:
        return Routing, ()

    def forget(self, adapter: str) -> None:
        """Drop what was noted of the current task of ``adapter``: it is another one now, or gone."""
        self.seen.pop(adapter, None)
        self.learned.pop(adapter, None)

    def clear(self) -> None:
        self.mixture = self.weights = self.gates = self.owner = self.cache = self.longer = None


class PromptRouter:
    """Computes the weights of each forward of ``base`` and hands them to the layers through ``routing``."""

    def __init__(self, attention: SharedAttention, routing: Routing) -> None:
        self.attention = attention
        self.routing = routing
        self.prompts: SoftPrompts | None = None  # of pools with block="prompt"
        self.handles: list[Any] = []
        self.base: nn.Module | None = None

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
        if self.base is not None:
            ungate_checkpoints(self.base)

    def active(self) -> str | None:
        """The adapter that routes now, or None if adapters are disabled or the active one is not a pool."""
        if self.attention.disable_adapters:
            return None
        return next((a for a in self.attention.active_adapters if self.attention.holds(a)), None)

    @torch.compiler.disable
    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        given = {name: kwargs.pop(name) for name in SAPT_ARGUMENTS if name in kwargs}
        if getattr(module, "_is_replica", False):
            raise SaptError("nn.DataParallel is not supported: start the script with torchrun or accelerate launch.")
        if type(kwargs.get("cache")).__name__.startswith("Paged"):
            raise SaptError("Continuous batching is not supported: its rows hold tokens of several requests.")
        adapter = self.active()
        inside = self.routing.weights is not None and module is not self.base  # an encoder in a routed forward
        if adapter is None or inside:
            return (args, kwargs) if given else None
        self.routing.clear()  # an interrupted forward (KeyboardInterrupt) leaves its weights behind
        inputs = {**named_arguments(module, args), **kwargs, **given}
        self.use(self.mixture_for(module, adapter, inputs))
        self.routing.owner, self.routing.cache = module, inputs.get("past_key_values")
        if module.training and torch.is_grad_enabled():
            gate_checkpoints(module, self.routing)
            if self.attention.head_is_shut(adapter):
                seal_heads(module, adapter, sealed=True, trains=False)
        if self.attention.configs[adapter].block == "prompt":
            return (), self.with_prompt(module, adapter, {**named_arguments(module, args), **kwargs})
        return args, kwargs

    def with_prompt(self, module: nn.Module, adapter: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward with the mixed soft prompt in front."""
        prompts, weights = self.prompts, self.routing.weights
        assert prompts is not None and weights is not None and self.base is not None
        length, encoder_decoder = self.attention.configs[adapter].num_virtual_tokens, is_encoder_decoder(self.base)
        changed, self.routing.longer = put_before(
            module, lambda: prompts.mixed(adapter, weights), length, inputs, encoder_decoder
        )
        return changed

    def use(self, mixture: Mixture) -> None:
        self.routing.mixture, self.routing.weights, self.routing.gates = mixture, mixture.weights, mixture.gates

    @torch.compiler.disable
    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        routing = self.routing
        mixture = routing.mixture
        if mixture is None or routing.owner is not module:
            return None
        cache = getattr(output, "past_key_values", routing.cache)
        if mixture.weights.dim() == 3:
            pass  # per token of packed rows: nothing that a next token could continue
        elif cache is not None and not isinstance(cache, tuple):
            setattr(cache, KEPT, mixture.detached())
            if mixture.config.block == "prompt":
                setattr(cache, VIRTUAL, mixture.config.num_virtual_tokens)
        elif hasattr(output, "last_hidden_state") and not hasattr(output, "logits"):
            setattr(output, KEPT, mixture)
        longer = routing.longer
        routing.clear()
        return None if longer is None else without_virtual(output, mixture.config.num_virtual_tokens, longer)

    def mixture_for(self, module: nn.Module, adapter: str, inputs: dict[str, Any]) -> Mixture:
        """Attention weights of one forward of ``module``, float32: [B, T], or [B, S, T] for packed rows."""
        config, batch = self.attention.configs[adapter], batch_of(inputs)
        if inputs.get("sapt_weights") is not None or inputs.get("sapt_task") is not None:
            weights = self.given_weights(adapter, inputs, batch, self.attention.weight.device)
            self.check_trainable(inputs, adapter, module)
            return Mixture(adapter, weights, config)
        if self.routing.session is not None and self.routing.session.adapter == adapter:
            return self.routing.session.spread(batch, "this generation")
        cache = inputs.get("past_key_values")
        if cache is not None and hasattr(cache, "get_seq_length") and int(cache.get_seq_length()) > 0:
            return self.kept_mixture(cache, adapter, batch, "past_key_values").hold()
        encoded = inputs.get("encoder_outputs")
        if encoded is not None:
            return self.kept_mixture(encoded, adapter, batch, "encoder_outputs")
        return Mixture(adapter, self.computed_weights(module, adapter, inputs), config)

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

    def check_learned(self, adapter: str) -> None:
        """A closed-form router must know a task before its block trains, or the block would get no weight."""
        task = self.attention.configs[adapter].task_name
        if not self.attention.closed_form(adapter) or self.routing.learned.get(adapter) == task:
            return
        if not self.attention.learned(adapter)[-1]:
            raise TaskError(
                f"The router has not seen prompts of task {task!r}: train with ArmCallback, which shows them to it, "
                "or call model.fit_router(batches) before training."
            )
        self.routing.learned[adapter] = task

    def kept_mixture(self, holder: Any, adapter: str, batch: int, what: str) -> Mixture:
        kept: Mixture | None = getattr(holder, KEPT, None)
        count = len(self.attention.configs[adapter].tasks or [])
        if kept is None or kept.adapter != adapter or kept.weights.shape[-1] != count:
            raise WeightsError(
                f"{what} was given, but it carries no attention weights of the active pool ({count} tasks), and the "
                "prompt itself is not in this call. Produce it with this model and pool, or pass sapt_weights=[B, T] "
                "or sapt_task=name."
            )
        return kept.spread(batch, what)

    def computed_weights(self, module: nn.Module, adapter: str, inputs: dict[str, Any]) -> Tensor:
        training = module.training and torch.is_grad_enabled()
        config = self.attention.configs[adapter]
        pooled, _, segments = read_prompts(module, config, inputs, training)  # [N, d]
        weights = self.attend(pooled, adapter)  # [N, T]
        if training:
            self.check_learned(adapter)
            self.remember(pooled, adapter)
        else:
            weights = select(weights, config.top_k, config.min_weight)
        return weights if segments is None else weights[segments]  # [B, T] or [B, S, T]

    def attend(self, pooled: Tensor, adapter: str) -> Tensor:
        """Pooled prompts [B, d] -> weights [B, T]; uniform for a row without any prompt token."""
        empty = pooled.isnan().any(dim=1, keepdim=True)
        filled = pooled.masked_fill(empty, 0.0)
        weights = self.attention.log_weights(filled, adapter).exp()
        far = self.attention.is_far(adapter, filled)
        if far is not None:
            weights = weights.masked_fill(far.unsqueeze(1), 0.0)
        return torch.where(empty, torch.full_like(weights, 1 / weights.shape[1]), weights)

    def remember(self, pooled: Tensor, adapter: str) -> None:
        seen = self.routing.seen.setdefault(adapter, [])
        count = sum(len(rows) for rows in seen)
        if count < SEEN_ROWS:
            pooled = pooled[~pooled[:, 0].isnan()]  # packed rows may end in padding
            seen.append(pooled[: SEEN_ROWS - count].detach().clone())


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
    other = (v for k, v in inputs.items() if isinstance(v, Tensor) and k not in SAPT_ARGUMENTS and v.dim() > 0)
    first = next(other, None)  # a model with arguments of its own
    if first is not None:
        return int(first.shape[0])
    raise PromptError("Neither input_ids nor inputs_embeds is given: the attention needs the prompt.")
