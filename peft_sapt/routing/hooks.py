"""How the attention weights of a forward are found and travel to the layers.

Every caller (PEFT's classes, ``generate``, pipelines, a direct call of the base model) goes through the ``__call__``
of the base model, or of the encoder where ``generate`` runs it alone. Forward hooks there decide, in this order:
weights or a task given by the caller, those of the generation under way, those kept with a non-empty cache, those kept
with encoder outputs, and otherwise the router on this forward's prompt tokens.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..config import FOLLOWED, SaptConfig
from ..errors import PromptError, SaptError, TaskError, TrainingError, WeightsError
from ..pool_module import freeze_heads
from .caches import cache_among, is_filled, keep_with_output, kept_with, length_of, past_of
from .checkpointing import route_checkpoints, unroute_checkpoints
from .features import PromptReader
from .forward_state import ForwardState, GenerationSession
from .memory import TaskMemory
from .mixture import Mixture
from .notices import a_caller_trains, warn_once
from .optimizers import block_sums, newest_block, steps_taken
from .prompt_mask import is_encoder_decoder
from .prompts import read_prompts
from .router import Router
from .soft_prompts import SoftPrompts, prepend_prompt, strip_prompt
from .statistics import TaskStatistics
from .towers import rows_agree
from .weights import check_weights, one_hot, select

FEW_TOKENS = 2  # that follow in one call as an answer goes on, drafted ones among them
SHARED_START = (
    "{what} is a copy, was repeated or cut back, and gets several tokens: its attention weights stay those of the "
    "tokens that filled it. Where these are the start of many prompts, such as a system prompt, pass "
    "sapt_weights=model.attention_weights(...) of the whole prompt, or give the whole prompt without the cache."
)
SAPT_ARGUMENTS = ("sapt_task", "sapt_weights", "sapt_prompt_mask")


class RoutingHooks:
    """Computes the weights of each forward of ``base`` and hands them to the layers through ``state``."""

    def __init__(self, memory: TaskMemory, state: ForwardState) -> None:
        self.memory = memory
        self.state = state
        self.reader = PromptReader(state)
        self.routers: dict[str, Router] = {}  # by kind
        self.statistics = TaskStatistics()
        self.statistics.hooks = self
        self.prompts: SoftPrompts | None = None  # of pools with block="prompt"
        self.handles: list[Any] = []
        self.base: nn.Module | None = None
        self.followed: dict[str, tuple[Any, ...]] = {}  # what was last seen at peft_config, by adapter
        self.has_towers = False  # whether a layer has rows that are not the prompts'

    def attach(self, base: nn.Module) -> None:
        """Register the hooks on ``base`` and on its encoder, if it is an encoder-decoder."""
        self.base, points = base, [base]
        if is_encoder_decoder(base):
            points.append(base.get_encoder())  # type: ignore[operator]  # an encoder-decoder has it
        for module in points:
            self.handles.append(module.register_forward_pre_hook(self.before, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self.after, always_call=True))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self.base is not None:
            unroute_checkpoints(self.base)

    def active(self) -> str | None:
        """The adapter that routes now, or None if adapters are disabled or the active one is not a pool."""
        if self.memory.disable_adapters:
            return None
        return next((a for a in self.memory.active_adapters if self.memory.holds(a)), None)

    def config_of(self, adapter: str) -> SaptConfig:
        """The config of a pool, with what its user has set at ``peft_config`` since; raises [`SaptError`] for values
        outside their range."""
        config = self.memory.configs[adapter]
        shown = getattr(self.base, "peft_config", {}).get(adapter)
        shown = shown if isinstance(shown, SaptConfig) else config  # after unload it may be anybody's
        values = tuple(getattr(shown, name) for name in FOLLOWED)
        if values != self.followed.get(adapter):
            trial = copy.copy(config)
            for name, value in zip(FOLLOWED, values, strict=True):
                setattr(trial, name, value)
            trial.check_ranges()
            for name, value in zip(FOLLOWED, values, strict=True):
                setattr(config, name, value)
            self.followed[adapter] = values
        return config

    def router_of(self, adapter: str) -> Router:
        return self.routers[self.config_of(adapter).router]

    # --- the hooks ------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        given = {name: kwargs.pop(name) for name in SAPT_ARGUMENTS if name in kwargs}
        if getattr(module, "_is_replica", False):
            raise SaptError("nn.DataParallel is not supported: start the script with torchrun or accelerate launch.")
        if any(type(value).__name__.startswith("Paged") for value in (*args, *kwargs.values())):
            raise SaptError("Continuous batching is not supported: its rows hold tokens of several requests.")
        adapter, state = self.active(), self.state
        inside = state.weights is not None and module is not self.base  # an encoder in a routed forward
        if adapter is None or inside:
            return (args, kwargs) if given else None
        state.clear()  # an interrupted forward (KeyboardInterrupt) leaves its weights behind
        inputs = {**named_arguments(module, args), **kwargs, **given}
        training = is_training(module)
        if training:
            if self.memory.head_is_frozen(adapter):
                freeze_heads(module, adapter, frozen=True, trains=False)
            self.check_trains(adapter, inputs)
        state.use(self.mixture_for(module, adapter, inputs))
        state.owner, state.cache = module, past_of(inputs)
        if self.has_towers:
            state.rows_agree = rows_agree(inputs, module)
        if training:
            route_checkpoints(module, state)
        if self.config_of(adapter).block == "prompt":
            return (), self.with_prompt(module, adapter, {**named_arguments(module, args), **kwargs})
        return args, kwargs

    def check_trains(self, adapter: str, inputs: dict[str, Any]) -> None:
        """Raises [`TrainingError`] if nothing would get a gradient from a training forward, and says why."""
        embeddings = inputs.get("inputs_embeds")
        if embeddings is not None and embeddings.requires_grad:
            return
        try:
            self.memory.refuse_untrainable(adapter)
        except TrainingError:
            if inputs.get("labels") is not None or not a_caller_trains():  # else a backbone under somebody's own head
                raise

    @torch.compiler.disable
    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        state = self.state
        mixture = state.mixture
        if mixture is None or state.owner is not module:
            return None
        session = state.session
        if session is None or not state.generates:
            keep_with_output(output, state.cache, mixture, of_encoder=module is not self.base)
        else:  # the cache is looked at once, and again when the generation ends
            if session.cache is None or session.cache is not state.cache:
                kept = keep_with_output(output, state.cache, mixture)
                session.cache = kept if session.cache is None else session.cache
            session.last = mixture
        inserted = state.inserted
        state.clear()
        return None if inserted is None else strip_prompt(output, mixture.config.num_virtual_tokens, inserted)

    def with_prompt(self, module: nn.Module, adapter: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward with the mixed soft prompt in front."""
        prompts, weights = self.prompts, self.state.weights
        assert prompts is not None and weights is not None and self.base is not None
        length, encoder_decoder = self.config_of(adapter).num_virtual_tokens, is_encoder_decoder(self.base)
        off = None if is_training(module) else (weights == 0).all(dim=-1)  # [B], of the base model
        changed, self.state.inserted = prepend_prompt(
            module, lambda: prompts.mixed(adapter, weights), length, inputs, encoder_decoder, self.state.generates, off
        )
        return changed

    # --- the weights ------------------------------------------------------------------------------------------------

    def mixture_for(self, module: nn.Module, adapter: str, inputs: dict[str, Any], whole: bool = False) -> Mixture:
        """The mixture of one forward of ``module``: weights [B, T], or [B, S, T] for packed rows, in float32.

        Args:
            whole: ``inputs`` are those of a ``generate``, the tokens in its cache among them.
        """
        config, batch, session = self.config_of(adapter), batch_of(inputs), self.state.session
        if inputs.get("sapt_weights") is not None or inputs.get("sapt_task") is not None:
            weights = self.given_weights(adapter, inputs, batch, self.memory.device)
            self.check_trainable(inputs, adapter, module)
            return Mixture(adapter, weights, config)
        if session is not None and session.mixture.adapter == adapter and self.is_of(session, module, inputs):
            self.state.generates = True
            return session.mixture.spread(batch, "this generation")
        name, cache = cache_among(inputs)
        if is_filled(cache):
            more = new_tokens(inputs) - (length_of(cache) if whole else 0)
            return self.kept_mixture(cache, adapter, batch, name, more).hold()
        encoded = inputs.get("encoder_outputs")
        if encoded is not None:
            return self.kept_mixture(encoded, adapter, batch, "encoder_outputs")
        return Mixture(adapter, self.computed_weights(module, adapter, inputs), config)

    def refuse_eval_mode(self, adapter: str) -> None:
        """Raises [`TrainingError`] if a supervised forward in eval mode would leave the newest block out."""
        config, router = self.config_of(adapter), self.router_of(adapter)
        if not any(p.requires_grad for p in newest_block(self.base, adapter)):
            return
        selects = config.min_weight > 0 or (config.top_k is not None and config.top_k < len(config.tasks))
        unfitted = not router.needs_replay and not router.is_fitted(adapter)
        if selects or unfitted:
            why = "top_k and min_weight leave blocks out" if selects else "its router has not seen the newest task"
            raise TrainingError(
                f"A supervised forward with gradients in eval mode, where {why}: call model.train() to train task "
                f"{config.tasks[-1]!r}, or use torch.no_grad() to evaluate."
            )

    def is_of(self, session: GenerationSession, module: nn.Module, inputs: dict[str, Any]) -> bool:
        """Whether a forward of ``module`` is one of the generation under way, and not of another prompt meanwhile, as
        a logits processor or a streamer may run it."""
        cache, ids, prompt = past_of(inputs), inputs.get("input_ids"), session.prompt
        if session.last is None:
            return ids is None or prompt is None or follows(ids, prompt)
        if cache is not None:
            return session.cache is None or cache is session.cache or kept_with(cache) is None
        if session.cache is not None:
            return False
        if module is self.base and is_encoder_decoder(module):
            return inputs.get("encoder_outputs") is not None
        return ids is None or prompt is None or follows(ids, prompt)  # recomputed from the start at each token

    def given_weights(self, adapter: str, inputs: dict[str, Any], batch: int, device: torch.device) -> Tensor:
        tasks = self.config_of(adapter).tasks
        if inputs.get("sapt_task") is not None:
            if inputs.get("sapt_weights") is not None:
                raise WeightsError("sapt_task and sapt_weights are both given: pass one of them.")
            return one_hot(inputs["sapt_task"], tasks, batch, device)
        return check_weights(inputs["sapt_weights"], tasks, batch, device)

    def check_trainable(self, inputs: dict[str, Any], adapter: str, module: nn.Module) -> None:
        names = inputs.get("sapt_task")
        if names is None or not is_training(module):
            return
        newest = self.config_of(adapter).tasks[-1]
        other = {names} if isinstance(names, str) else set(names)
        if other - {newest}:
            raise TaskError(
                f"Training on task {sorted(other - {newest})} is refused: its block is frozen, only the current task "
                f"{newest!r} trains. Use model.add_task(...) for new data, or model.eval() to ask for an answer."
            )

    def kept_mixture(self, holder: Any, adapter: str, batch: int, what: str, more: int = 0) -> Mixture:
        """The mixture that ``holder`` (the argument ``what``) was made with, for the rows that it has now.

        Args:
            more: tokens a row that this call adds to it.
        """
        kept, tasks = kept_with(holder), self.config_of(adapter).tasks
        count = len(tasks)
        if kept is None or kept.mixture.adapter != adapter or kept.tasks != tasks:
            raise WeightsError(
                f"{what} was given, but it carries no attention weights of the active pool ({count} tasks), and the "
                "prompt itself is not in this call. Produce it with this model and pool, or pass sapt_weights=[B, T] "
                "or sapt_task=name."
            )
        mixture, begins_several = kept.follow(holder, what)
        refilled = kept.first - length_of(holder)  # as assisted decoding cuts a token more than it drafted
        if more - (refilled if 0 < refilled <= FEW_TOKENS else 0) > FEW_TOKENS and begins_several:
            warn_once(self.base, SHARED_START.format(what=what))  # type: ignore[arg-type]  # it runs
        return mixture.spread(batch, what)

    def computed_weights(self, module: nn.Module, adapter: str, inputs: dict[str, Any]) -> Tensor:
        training, config, router = is_training(module), self.config_of(adapter), self.router_of(adapter)
        pooled, _, segments = read_prompts(module, config, self.reader, inputs, training)  # [N, d]
        learns = training or (torch.is_grad_enabled() and inputs.get("labels") is not None)
        weights = router.attend(adapter, pooled, learns)  # [N, T]
        if torch.is_grad_enabled():
            router.check_frozen(adapter)
            self.memory.check_frozen(adapter)
        if training:
            router.check_ready(adapter)
            if (noted := self.memory.training_of(adapter)).start is None:
                noted.start = steps_taken(), block_sums(self.base, adapter)  # type: ignore[arg-type]  # it runs
            self.memory.remember(adapter, pooled)
        else:
            if torch.is_grad_enabled() and inputs.get("labels") is not None:
                self.refuse_eval_mode(adapter)
            weights = select(weights, config.top_k, config.min_weight, config.renormalize)
        return weights if segments is None else weights[segments]  # [B, T] or [B, S, T]


def follows(ids: Tensor, prompt: Tensor) -> bool:
    """Whether rows of ``ids`` [B', S'] are those of ``prompt`` [B, S], for each of their beams: continued, or a part
    from its start or to its end."""
    if len(ids) % len(prompt):
        return False
    rows, width = (
        prompt.repeat_interleave(len(ids) // len(prompt), dim=0).to(ids.device),
        min(ids.shape[1], prompt.shape[1]),
    )
    return torch.equal(ids[:, :width], rows[:, :width]) or torch.equal(ids[:, -width:], rows[:, -width:])


def new_tokens(inputs: dict[str, Any]) -> int:
    """Tokens a row among the arguments of a forward; of a ``generate``, the whole prompt's."""
    found = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    return found.shape[1] if isinstance(found, Tensor) and found.dim() > 1 else 0


def is_training(module: nn.Module) -> bool:
    """Whether a forward of ``module`` now is one to learn from."""
    return module.training and torch.is_grad_enabled()


def named_arguments(module: nn.Module, args: tuple) -> dict[str, Any]:
    """The positional arguments of a call of ``module`` by their names."""
    if not args:
        return {}
    kinds = inspect.signature(module.forward).parameters.items()
    names = [name for name, kind in kinds if kind.kind in (kind.POSITIONAL_ONLY, kind.POSITIONAL_OR_KEYWORD)]
    return dict(zip(names or [getattr(module, "main_input_name", "input_ids")], args, strict=False))


def batch_of(inputs: dict[str, Any], at_least_one: bool = False) -> int:
    """Rows of this forward; for an encoder-decoder fed with encoder outputs, those of the decoder.

    Args:
        at_least_one: of a call that may begin with a token of the model's own, in one row.
    """
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels"):
        if isinstance(inputs.get(name), Tensor):
            return int(inputs[name].shape[0])
    encoded = inputs.get("encoder_outputs")
    if encoded is not None:
        return int(encoded[0].shape[0])
    other = (v for k, v in inputs.items() if isinstance(v, Tensor) and k not in SAPT_ARGUMENTS and v.dim() > 0)
    first = next(other, None)  # a model with arguments of its own
    if first is not None or at_least_one:
        return 1 if first is None else int(first.shape[0])
    raise PromptError(
        "Neither input_ids nor inputs_embeds is given, and the attention needs the prompt: give one of them, or "
        "sapt_weights=[B, T] or sapt_task=name."
    )
