"""SaptModel: the PEFT tuner. Injects the layers and the shared attention, and owns the ways in and out of a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .attention import SharedAttention
from .config import SaptConfig
from .errors import SaptError
from .exchange import LoraExchange
from .layer import Linear, SaptLayer, takes_as_linear
from .mixture import Mixture
from .pool import PoolModule
from .pooling import checked_token_dim, embedding_weight
from .prompt_mask import inferred_mask
from .routing import KEPT, SAPT_ARGUMENTS, PromptRouter, Routing, batch_of
from .saving import PoolSaving
from .soft_prompt import SoftPrompts, check_generation
from .tasks import seal_from_targets

try:  # accelerate is PEFT's own dependency; a private move there must not break the import
    from accelerate import init_empty_weights
except ImportError:  # pragma: no cover
    init_empty_weights = None

OWN_MODULES = ("shared_attention", "soft_prompts")  # of ours, on the base model


class SaptModel(LoraExchange, PoolSaving, BaseTuner):
    """A base model with one or more pools of LoRA blocks under a shared attention (SAPT, ACL 2024).

    Built by ``get_peft_model(model, SaptConfig(...))``; its methods are reachable on the [`PeftModel`] around it.

    ``forward`` and ``generate`` take three arguments of their own:
        - ``sapt_prompt_mask`` [B, S]: True on the tokens that form the query, by default the attended ones before the
          first supervised label.
        - ``sapt_weights`` [B, T] (or [T]): use these weights instead of the attention's.
        - ``sapt_task``: a task's name, or one per row; its block alone answers. In training only the current task.

    Raises:
        PoolFormatError: the base model's embeddings have another width than those the pool was made for.
        TaskError, PromptError, WeightsError: as the methods say.
    """

    prefix = "sapt_"
    tuner_layer_cls = PoolModule
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    # --- building -----------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        if adapter_name.isdigit():
            raise SaptError(f"Adapter name {adapter_name!r} is all digits, which PEFT confuses with layer indices.")
        # the pool grows by changing its config, so it must not be the caller's object
        given = self.peft_config[adapter_name]
        config = self.peft_config[adapter_name] = copy.deepcopy(given)
        if config.task_type in ("TOKEN_CLS", "QUESTION_ANS"):
            # PEFT adds the head to the caller's object, after this: one list for both
            given.modules_to_save = config.modules_to_save = given.modules_to_save or []
        embedding = embedding_weight(model)
        config.token_dim = checked_token_dim(config.token_dim, embedding)
        known: SharedAttention | None = getattr(model, "shared_attention", None)
        self._routing: Routing = Routing() if known is None else known.router.routing
        own = [name for name in OWN_MODULES if hasattr(model, name)]
        taken = {name: getattr(model, name) for name in own}
        for name in own:  # so that no name in modules_to_save, as "norm", is found in them
            delattr(model, name)
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        finally:
            for name, module in taken.items():
                setattr(model, name, module)
        if known is None:
            attention = SharedAttention()
            attention.router = PromptRouter(attention, self._routing)
            attention.router.attach(model)
            model.shared_attention = attention
            attention.router.handles.append(model.register_load_state_dict_post_hook(seal_after_load))
            known = attention
        device = None if embedding is None else embedding.device
        with init_empty_weights() if low_cpu_mem_usage and init_empty_weights is not None else nullcontext():
            known.update_layer(adapter_name, config, None if low_cpu_mem_usage else device)
            if config.block == "prompt":
                self._add_soft_prompts(model, known.router).update_layer(adapter_name, config, embedding)
        for module in (known, known.router.prompts):
            if module is not None:
                module.set_adapter(self.active_adapters, inference_mode=bool(config.inference_mode))
        seal_from_targets(model)

    def _add_soft_prompts(self, model: nn.Module, router: PromptRouter) -> SoftPrompts:
        if router.prompts is None:
            model.soft_prompts = router.prompts = SoftPrompts()
            router.prompts.router = router
        return router.prompts

    def _create_and_replace(
        self,
        peft_config: SaptConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, SaptLayer):
            target.update_layer(adapter_name, peft_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not takes_as_linear(base):
            raise SaptError(
                f"Module {current_key!r} of type {type(base).__name__} cannot be adapted: SAPT takes nn.Linear, "
                "Conv1D and the quantised linear layers that PEFT knows. Take it out of target_modules."
            )
        layer = Linear(target, adapter_name, peft_config, self._routing, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As in PEFT; with False, new blocks get the number type of their layer, loaded ones keep that of the file.

        The attention stays in float32, which its softmax needs and which costs next to nothing.
        """
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype or adapter_name in self.attention.loaded:
            return
        for module in self.model.modules():
            if isinstance(module, SaptLayer) and module.holds(adapter_name):
                module.cast_adapter(adapter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):  # a head, which need not have the weight PEFT would move
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    # --- running ------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise SaptError(
                "adapter_names (one adapter per row) is not supported: tasks live inside one adapter, so pass "
                "sapt_task=[name, ...] with one task per row instead."
            )
        adapter = self._routing_adapter()
        if adapter is None or not self._may_generate_here(adapter, kwargs):
            yield
            return
        with self._held(self._generation_mixture(adapter, args, kwargs)):
            yield

    def _routing_adapter(self) -> str | None:
        """The adapter that routes now; None also while PEFT has not finished building the model."""
        return self.prompt_router.active() if hasattr(self.model, "shared_attention") else None

    @contextmanager
    def _held(self, mixture: Mixture | None) -> Iterator[None]:
        """Let every forward inside use ``mixture``."""
        routing = self._routing
        previous = routing.session, routing.stacks
        routing.session, routing.stacks = mixture, None if mixture is None else {}
        try:
            yield
        finally:
            routing.session, routing.stacks = previous

    def _may_generate_here(self, adapter: str, kwargs: dict[str, Any]) -> bool:
        """PeftModel without a generating task type calls the base model's ``generate`` itself, within PEFT's context.

        The same context surrounds its ``forward``. In eval mode both may use weights computed here, as they are those
        that the forward would compute from the same prompt; unless labels end the prompt, or a cache holds it.
        """
        if kwargs.get("labels") is not None or kwargs.get("past_key_values") is not None:
            return False
        generates = hasattr(self.model, "generate") and not self.model.training
        typed = self.peft_config[adapter].task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
        return generates and not typed and self._routing.session is None

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``generate`` of the base model; the weights are computed once, on the whole prompt, and held to the end.

        A non-empty ``past_key_values`` keeps the weights it was made with, so that the turns of a chat stay with one
        mixture. Takes ``sapt_task``, ``sapt_weights`` and ``sapt_prompt_mask`` like ``forward``.
        """
        given = {name: kwargs.pop(name) for name in SAPT_ARGUMENTS if name in kwargs}
        adapter = self._routing_adapter()
        if adapter is None:
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]
        self._routing.clear()
        if self.peft_config[adapter].block == "prompt":
            check_generation(kwargs, kwargs.get("generation_config"), self.model.generation_config)
        with self._held(self._generation_mixture(adapter, args, {**kwargs, **given})):
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused (raises [`SaptError`]): continuous batching flattens requests into one row."""
        raise SaptError(
            "Continuous batching (generate_batch) is not supported: it flattens the tokens of all requests into one "
            "row, so that no prompt can be told from another. Use generate with a left-padded batch."
        )

    def _generation_mixture(self, adapter: str, args: tuple, kwargs: dict[str, Any]) -> Mixture | None:
        inputs = dict(kwargs)
        prompt = args[0] if args else inputs.pop("inputs", None)
        if prompt is not None:
            inputs["input_ids"] = prompt
        cache = inputs.get("past_key_values")
        explicit = any(inputs.get(name) is not None for name in ("sapt_task", "sapt_weights"))
        if not explicit and cache is not None and getattr(cache, KEPT, None) is None:
            inputs.pop("past_key_values")  # filled by somebody else: the whole prompt is here, so attend to it
        inputs.pop("labels", None)
        if inputs.get("attention_mask") is None and isinstance(inputs.get("input_ids"), Tensor):
            inputs["attention_mask"] = inferred_mask(inputs["input_ids"], *self._generation_tokens(inputs))
        if not any(isinstance(inputs.get(n), Tensor) for n in ("input_ids", "inputs_embeds")):
            if inputs.get("encoder_outputs") is None:
                return None  # generation from the start token alone: its forward is the prompt
        mixture = self.prompt_router.mixture_for(self.model, adapter, inputs)
        return mixture.spread(batch_of(inputs), "generate").hold()

    def _generation_tokens(self, kwargs: dict[str, Any]) -> tuple[int | None, int | list[int] | None]:
        """Pad and end token as ``generate`` resolves them: argument, generation config, model config."""
        sources = [kwargs.get("generation_config"), self.model.generation_config, self.model.config]

        def find(name: str) -> Any:
            found = [kwargs.get(name), *(getattr(source, name, None) for source in sources)]
            return next((value for value in found if value is not None), None)

        return find("pad_token_id"), find("eos_token_id")

    # --- PEFT's switches ----------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise SaptError(f"One pool can be active at a time, got {adapter_name}: pass a single adapter name.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            raise SaptError(
                "A pool cannot be merged into the base model: its mixture differs from prompt to prompt. Keep the "
                "adapter, call unload() for the base model without it, or export_mixture(weights, folder) for one "
                "fixed mixture, which is a plain LoRA and merges."
            )
        model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if hasattr(model, "shared_attention"):
            model.shared_attention.router.detach()
        for name in OWN_MODULES:
            if hasattr(model, name):
                delattr(model, name)
        return model

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._unload_and_optionally_merge(merge=True)

    def unmerge_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise SaptError("There is nothing to unmerge: a pool is never merged into its base model.")


def seal_after_load(model: nn.Module, incompatible: Any) -> None:
    seal_from_targets(model)
