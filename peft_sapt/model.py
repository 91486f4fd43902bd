"""SaptModel: the PEFT tuner. Injects layers, router and memory into a base model, and is the public face of a pool.

What the calls on a pool do stands in ``pool/``, how a prompt finds its blocks in ``routing/``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .config import SaptConfig
from .errors import SaptError, TaskError
from .layer import SaptLayer, layer_around
from .pool import exchange, lifecycle, warm_start
from .pool.own_config import check_place, prepare_given
from .pool.refusals import NO_ADAPTER_NAMES, NO_BATCH, NO_MERGE, NO_WEIGHTED
from .pool.state_dict import check_places, checked_state, keep_dtypes, room_for, with_manifest
from .pool.view import Batches, Pool
from .pool_module import PoolModule
from .routing import AttentionRouter, Router
from .routing.forward_state import ForwardState
from .routing.generation import check_prompt_generation, held, session_of
from .routing.hooks import SAPT_ARGUMENTS, RoutingHooks
from .routing.install import install, memory_on, put_aside, uninstall
from .routing.prompts import embedding_weight
from .routing.towers import tower_of


class SaptModel(BaseTuner):
    """A base model with one or more pools of LoRA blocks under a shared attention (SAPT, ACL 2024), as
    ``get_peft_model(model, SaptConfig(...))`` builds it. Its methods are reachable on the [`PeftModel`] around it and
    act on the active adapter.

    ``forward`` and ``generate`` take three arguments of their own:
        - ``sapt_prompt_mask`` [B, S]: True on the tokens that form the query, by default the attended ones before the
          first supervised label.
        - ``sapt_weights`` [B, T] (or [T]): use these weights instead of the attention's.
        - ``sapt_task``: a task's name, or one per row; its block alone answers. In training only the current task.

    Raises [`PoolFormatError`] if the base model's embeddings have another width than those the pool was made for.
    """

    peft_config: dict[str, SaptConfig]  # type: ignore[assignment]  # all configs of this tuner are its own
    prefix = "sapt_"
    tuner_layer_cls = PoolModule
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]  # PEFT's type is narrower than its use

    @property
    def pool(self) -> Pool:
        """The active pool, as a view; raises [`TaskError`] if several adapters are active, or none."""
        active, hooks = self.active_adapters, self.hooks
        if len(active) != 1:
            raise TaskError(f"{len(active)} adapters are active: choose one pool with set_adapter(name).")
        config = hooks.config_of(active[0])
        return Pool(self.model, active[0], config, hooks.router_of(active[0]), hooks.memory, hooks)

    @property
    def hooks(self) -> RoutingHooks:
        """What finds the weights of a forward and brings them to the layers, with routers and memory of all pools."""
        return self.model.task_memory.hooks

    @property
    def router(self) -> Router:
        """The router of the active pool."""
        return self.pool.router

    @property
    def attention(self) -> AttentionRouter:
        """The learned attention of the active pool; raises [`TaskError`] if its router is of another kind."""
        router = self.router
        if not isinstance(router, AttentionRouter):
            raise TaskError(f"The pool has router={router.kind!r} and no learned attention: see model.router.")
        return router

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks in the active pool, oldest first; a copy."""
        return self.pool.tasks

    @property
    def current_task(self) -> str:
        """The newest task: the only one that can be trained."""
        return self.pool.current_task

    @property
    def committed_tasks(self) -> list[str]:
        """Names of the tasks that have been committed."""
        return self.pool.committed_tasks

    def task_state(self, name: str) -> dict[str, Tensor]:
        """What belongs to one task alone, as views by name: A [r, in] and B [r, out] of its block in each layer (or a
        soft prompt [P, d]), and what the router keeps of it, such as a key [1, query_dim]."""
        return self.pool.task_state(name)

    def add_task(self, name: str, r: int | None = None, lora_alpha: float | None = None) -> None:
        """Freeze the current task for good and open a fresh block (B = 0) and key for ``name``.

        A current task that was never committed is committed first, as by ``commit_task()``. Parameters are replaced:
        build the optimizer, DDP or FSDP afterwards.

        Args:
            name: not in the pool yet; no slash or dot, not all digits.
            r, lora_alpha: rank and alpha of the new block; the config's by default.

        Raises:
            TaskError: the name is malformed or taken, the model is sharded, or the current task is open and no
                training prompt of it is known. Nothing is changed then.
        """
        lifecycle.add_task(self.pool, name, r, lora_alpha)

    def remove_task(self, name: str, forget: bool = False) -> None:
        """Take a task out of the pool; the others' blocks keep their bytes. Its prompts are strangers from then on,
        unless with ``forget`` nothing of it is kept to tell.

        Raises [`TaskError`] for an unknown name, or the only task of the pool (delete the adapter instead).
        """
        lifecycle.remove_task(self.pool, name, forget)

    def fit_router(self, inputs: Batches) -> None:
        """Show the current task's training prompts, as batches or pooled ones [N, d], to a router that is solved from
        them, before the task is trained; ``ArmCallback`` calls this.

        Raises:
            TaskError: the pool's router is fitted in training, or it has seen this task.
            PromptError: there are no rows, or some without prompt tokens. Nothing is changed then.
        """
        lifecycle.fit_router(self.pool, inputs)

    def fit_background(self, forms: Sequence[Batches]) -> None:
        """Show the pool prompts of no task, in place of those it knows: their like it leaves to the base model.
        ``ArmCallback`` shows it everyday ones.

        Args:
            forms: for each form in which such prompts come, batches of two or more, or pooled prompts [n, d].

        Raises:
            PromptError: too few prompts, or some without tokens. TaskError: ``statistics_rank=0`` keeps no statistics.
        """
        lifecycle.fit_background(self.pool, forms)

    def commit_task(self, inputs: Batches | None = None, replay: Batches | None = None) -> None:
        """Freeze the current task and store its attention target (SAPT, section 3.3); ``ArmCallback`` calls this.

        Args:
            inputs: the task's training inputs, as batches (dicts with ``input_ids``, ...) or pooled prompts [N, d].
                The target is the mean attention over them, and the key of a first task becomes their mean query (as it
                got no gradient). By default the first 512 rows that training forwards saw, in whatever thread or copy
                of the model; a file does not keep them.
            replay: rows that stand for this task while later ones train, as batches or pooled prompts [n, d]:
                pseudo-samples, or real rows if you may keep them. Only their pooled embeddings are kept.

        Raises:
            TaskError: the task is committed already, or no training prompt of it is known.
            PromptError: rows without a prompt token. TrainingError: a parameter is not finite. It stays open then.
        """
        lifecycle.commit_task(self.pool, inputs, replay)

    def reopen_task(self, forget: bool = False) -> None:
        """Undo the commit of the current task, to train it further on old rows and new ones. New rows alone, by which
        a block forgets, are refused by ``ArmCallback`` (see ``continue_task``), unless with ``forget``."""
        lifecycle.reopen_task(self.pool, forget)

    def continue_task(self, name: str, new_name: str | None = None) -> str:
        """Open a task for more data of ``name``, any task, without its old rows: a key of its own, and a block that
        starts as a copy of that one's, which keeps every byte. Returns its name, by default ``name-2``."""
        return warm_start.continue_task(self.pool, name, new_name)

    def warm_start(self, inputs: Batches) -> dict[str, float]:
        """Start the current task's fresh block at the mixture of the older ones, as its prompts' attention mixes them.

        A LoRA block becomes the nearest one of its rank to sum_t w_t s_t B_t A_t, a soft prompt sum_t w_t P_t, with
        w the mean attention [T - 1] over the older tasks alone, which is returned by name.
        ``ArmCallback(warm_start=True)`` calls this; without it, call it after ``add_task`` and before ``fit_router``.

        Raises:
            TaskError: there is no older task, or the current one is committed, trained or known to the router already.
            PromptError: no rows, or rows without prompt tokens. Nothing is changed then.
        """
        return warm_start.warm_start(self.pool, inputs)

    def record_task(self, name: str, **fields: Any) -> None:
        """Note what the model card says of a task; what was noted before and is not given now stays.

        Args:
            fields: ``rows`` seen in training, and what stands for them in ``replay`` (``ArmCallback`` notes both);
                ``score`` in the unit that ``metric`` names; where the ``data`` are from, their ``license``, and an
                ``example``: a prompt that may be shown, of at most 2000 characters.

        Raises:
            TaskError: there is no such task. SaptError: an unknown field, or a value of the wrong kind.
        """
        lifecycle.record_task(self.pool, name, **fields)

    @torch.no_grad()
    def attention_weights(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        sapt_prompt_mask: Tensor | None = None,
    ) -> Tensor:
        """The attention over the tasks for each prompt: [B, T] in float32, columns in the order of ``model.tasks``.

        Arguments are those of the model's forward, whose lowest layers run with ``features="hidden"``. A row that no
        task claims, which the base model answers, is zero.
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        batch |= {"labels": labels, "sapt_prompt_mask": sapt_prompt_mask}
        pool = self.pool
        return pool.router.attend(pool.adapter, pool.pooled_prompts([batch]))

    def pooled_prompts(self, batches: Batches) -> Tensor:
        """Features of all prompts in ``batches``, [N, feature_dim] in float32, as ``SaptConfig.features`` says.
        Tensors pass through; raises [`WeightsError`] for one that is not [N, feature_dim]."""
        return self.pool.pooled_prompts(batches)

    def export_task(self, name: str, folder: str | os.PathLike) -> None:
        """Write one task's block as a plain LoRA adapter, which needs PEFT alone (or a LoRA server) to run.

        (With ``block="prompt"`` an adapter of PEFT's prompt tuning, here and in the other two.) Its logits are those
        of the pool with ``sapt_task=name``. A block that was trained beside older ones may rely on them.

        Raises:
            TaskError: unknown name. LoraFolderError, PromptFolderError: ``folder`` is a file.
        """
        exchange.export_task(self.pool, name, folder)

    def export_mixture(self, weights: exchange.Shares, folder: str | os.PathLike) -> None:
        """Write a fixed mixture of tasks as one plain LoRA adapter; exact, as its rank is the sum of the ranks.

        ``sum_t w_t s_t B_t A_t = B A`` with the A_t stacked and the columns of B_t scaled by w_t s_t (in float32).
        Tasks of weight 0 are left out.

        Args:
            weights: one number per task in the order of ``tasks``, [T], such as a row of ``attention_weights``, or
                {task: weight} with 0 for the others.

        Raises:
            WeightsError: wrong count, not finite, or all zero. TaskError: ``weights`` names an unknown task.
        """
        exchange.export_mixture(self.pool, weights, folder)

    def import_task(self, name: str, folder: str | os.PathLike, inputs: Batches | None = None) -> None:
        """Take a plain LoRA adapter, of any rank and alpha, into the pool as its newest task or the current open one.

        The block stays trainable, and its key still has to be learned: train it further, or call ``arm.prepare(model,
        batches)`` and ``arm.reflect(model)`` with prompts of the task; with ``router="ridge"``
        ``commit_task(inputs=batches)`` is enough. Modules that the adapter leaves alone get a block that does nothing.

        Args:
            inputs: prompts of the task, as batches or pooled ones [n, d], which tell strangers from it.

        Raises:
            LoraFolderError: the folder is no plain LoRA, or adapts modules that the pool does not. Nothing is changed.
            PromptFolderError: it is no soft prompt of the pool's length. TaskError: the name belongs to an older task.
        """
        exchange.import_task(self.pool, name, folder, inputs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        check_place(model, adapter_name)
        embedding, given = embedding_weight(model), self.peft_config[adapter_name]
        config = self._own_config = prepare_given(given, embedding, model)
        memory = memory_on(model)
        self._state: ForwardState = ForwardState() if memory is None else memory.hooks.state
        with put_aside(model):
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        config.target_modules = given.target_modules  # found by PEFT in the meantime
        install(model, self._state, adapter_name, config, self.active_adapters, embedding, on_meta=low_cpu_mem_usage)
        self.hooks.has_towers = any(getattr(module, "tower", None) is not None for module in model.modules())

    def _create_and_replace(  # type: ignore[override]  # as all of PEFT's tuners narrow the config
        self,
        peft_config: SaptConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = self._own_config
        if isinstance(target, SaptLayer):
            target.update_layer(adapter_name, config)
            return
        tower = tower_of(self.model, current_key)
        layer = layer_around(target, adapter_name, config, self._state, current_key, tower)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As in PEFT; with False, new blocks get the dtype of their layer, loaded ones keep that of the file, and the
        router stays in float32, which its softmax needs."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype or adapter_name in self.hooks.memory.loaded:
            return
        for module in self.model.modules():
            if isinstance(module, SaptLayer) and module.holds(adapter_name):
                module.cast_adapter(adapter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):  # a head, which need not have the weight PEFT would move
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise SaptError(NO_ADAPTER_NAMES)
        yield

    def _routing_adapter(self) -> str | None:
        """The adapter that routes now; None also while PEFT has not finished building the model."""
        return None if memory_on(self.model) is None else self.hooks.active()

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``generate`` of the base model, with the arguments of ``forward``: weights are computed once, on the whole
        prompt, and held to the end. A non-empty ``past_key_values`` keeps those it was made with (a chat)."""
        given = {name: kwargs.pop(name) for name in SAPT_ARGUMENTS if name in kwargs}
        adapter = self._routing_adapter()
        if adapter is None:
            return self.model.generate(*args, **kwargs)
        self._state.clear()
        if self.peft_config[adapter].block == "prompt":
            check_prompt_generation(kwargs, kwargs.get("generation_config"), self.model.generation_config)
        with held(self._state, session_of(self.hooks, adapter, args, {**kwargs, **given})):
            return self.model.generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused (raises [`SaptError`]): continuous batching flattens requests into one row."""
        raise SaptError(NO_BATCH)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise SaptError(f"One pool can be active at a time, got {adapter_name}: pass a single adapter name.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]  # likewise
        cls,
        model: nn.Module,
        config: SaptConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        own = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return with_manifest(model, config, adapter_name, own, state_dict, cls._remove_adapter_name_from_key)

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]  # likewise
        cls, model: nn.Module, config: SaptConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        checked = checked_state(model, config, adapter_name, state_dict)
        with room_for(model, adapter_name, state_dict):
            renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, checked)
            check_places(model, adapter_name, renamed)
        keep_dtypes(model, renamed)
        memory = memory_on(model)
        if memory is not None:
            memory.loaded.add(adapter_name)
        return renamed

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            raise SaptError(NO_MERGE)
        model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        uninstall(model)
        return model

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused (raises [`SaptError`]): adapters are pools here, and tasks are mixed per prompt."""
        raise SaptError(NO_WEIGHTED)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise SaptError(NO_MERGE)

    def unmerge_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise SaptError("There is nothing to unmerge: a pool is never merged into its base model.")
