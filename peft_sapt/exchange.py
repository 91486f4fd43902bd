"""Ways out of a pool and into it: a task or a mixture as plain LoRA, a plain LoRA as a task."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .errors import LoraFolderError, TaskError, WeightsError
from .layer import SaptLayer
from .lora_folder import Factors, read_lora, write_lora
from .pool import linear_from
from .prompt_folder import read_prompt, write_prompt
from .soft_prompt import SoftPrompts
from .warm_start import WarmStart


class LoraExchange(WarmStart):
    """Export and import methods of [`SaptModel`]; they act on the active adapter."""

    def export_task(self, name: str, folder: str | os.PathLike) -> None:
        """Write one task's block as a plain LoRA adapter, which needs PEFT alone (or a LoRA server) to run.

        With ``block="prompt"`` it is an adapter of PEFT's prompt tuning, here and in the other two.

        Its logits are those of the pool with ``sapt_task=name``. A block that was trained beside older ones, with a
        share of attention on them, may rely on them: compare with ``export_mixture``.

        Raises:
            TaskError: unknown name.
            LoraFolderError, PromptFolderError: ``folder`` is a file.
        """
        self.refuse_sharded("export_task")
        index, config = self.index_of(name), self.pool_config
        if config.block == "prompt":
            write_prompt(folder, config, self._prompts()[index])
            return
        rank, alpha = (config.task_ranks or [])[index], (config.task_alphas or [])[index]
        factors = {key: pair[index] for key, pair in self._factors().items()}
        write_lora(
            folder, self._lora_config(rank, alpha, use_rslora=config.use_rslora), factors, self._saved_modules()
        )

    def export_mixture(
        self, weights: Mapping[str, float] | Sequence[float] | Tensor, folder: str | os.PathLike
    ) -> None:
        """Write a fixed mixture of tasks as one plain LoRA adapter; exact, as its rank is the sum of the ranks.

        ``sum_t w_t s_t B_t A_t = B A`` with the A_t stacked and the columns of B_t scaled by w_t s_t (in float32).
        Tasks of weight 0 are left out.

        Args:
            weights: one number per task in the order of ``tasks``, [T], such as a row of ``attention_weights``, or
                {task: weight} with 0 for the others.

        Raises:
            WeightsError: wrong count, not finite, or all zero.
            TaskError: ``weights`` names an unknown task.
        """
        self.refuse_sharded("export_mixture")
        config, chosen = self.pool_config, self._chosen(weights)
        if config.block == "prompt":
            prompts = torch.stack([prompt.float() for prompt in self._prompts()])  # [T, P, d]
            write_prompt(folder, config, torch.einsum("t,tpd->pd", torch.tensor(chosen).to(prompts), prompts))
            return
        kept = [i for i, weight in enumerate(chosen) if weight]
        scales = [chosen[i] * config.scalings[i] for i in kept]
        factors: Factors = {}
        for key, pairs in self._factors().items():
            a = torch.cat([pairs[i][0].float() for i in kept])  # [R, in]
            b = torch.cat([pairs[i][1].float() * s for i, s in zip(kept, scales, strict=True)], dim=1)  # [out, R]
            factors[key] = (a, b)
        rank = sum((config.task_ranks or [])[i] for i in kept)
        write_lora(folder, self._lora_config(rank, rank), factors, self._saved_modules())

    def import_task(self, name: str, folder: str | os.PathLike) -> None:
        """Take a plain LoRA adapter, of any rank and alpha, into the pool as its newest task.

        ``name`` is a new task, or the current one if that was not committed yet: its block is replaced then. The block
        gets the adapter's weights and stays trainable; its key still has to be learned: train it further, or call
        ``arm.prepare(model, batches)`` and ``arm.reflect(model)`` with prompts of the task; with ``router="ridge"``
        ``commit_task(inputs=batches)`` is enough. Modules that the adapter leaves alone get a block that does nothing.

        Raises:
            LoraFolderError: the folder is no plain LoRA, or adapts modules that the pool does not. Nothing is changed.
            PromptFolderError: the folder is no soft prompt, or one of another length.
            TaskError: the name is malformed or belongs to an older task.
        """
        if self.pool_config.block == "prompt":
            self._import_prompt(name, folder)
            return
        lora = read_lora(folder)
        layers = self._layers()
        foreign = sorted(set(lora.factors) - set(layers))
        if foreign:
            raise LoraFolderError(
                f"The LoRA in {os.fspath(folder)!r} adapts {foreign[:3]} ({len(foreign)} in all), which the pool does "
                "not: build the pool with target_modules that cover them."
            )
        for key, (a, b) in lora.factors.items():
            wanted = (layers[key].in_features, layers[key].out_features)
            if (a.shape[1], b.shape[0]) != wanted:
                raise LoraFolderError(
                    f"The LoRA in {os.fspath(folder)!r} has factors for {a.shape[1]} -> {b.shape[0]} features at "
                    f"{key}, where the base model has {wanted[0]} -> {wanted[1]}: it was made for another base model."
                )
        config, adapter = self.pool_config, self.pool_name
        alpha = lora.scaling * (lora.r**0.5 if config.use_rslora else lora.r)
        self._open(name, r=lora.r, lora_alpha=alpha)
        for key, layer in layers.items():
            block = layer.new_block(lora.r)
            if key in lora.factors:
                a, b = lora.factors[key]
                block = {"sapt_A": a, "sapt_B": b.T}
            for attr, value in block.items():
                weight = getattr(layer, attr)[adapter].weight
                getattr(layer, attr)[adapter] = linear_from(value.to(weight.device, weight.dtype))
        config.task_ranks = [*(config.task_ranks or [])[:-1], lora.r]
        config.task_alphas = [*(config.task_alphas or [])[:-1], alpha]
        self._imported()

    # --- parts --------------------------------------------------------------------------------------------------

    def _import_prompt(self, name: str, folder: str | os.PathLike) -> None:
        config, adapter, prompts = self.pool_config, self.pool_name, self._soft_prompts()
        prompt = read_prompt(folder, config.num_virtual_tokens, config.token_dim or 0)
        self._open(name)
        weight = prompts.sapt_prompt[adapter].weight
        prompts.sapt_prompt[adapter] = linear_from(prompt.to(weight.device, weight.dtype))
        self._imported()

    def _open(self, name: str, **block: Any) -> None:
        """Make ``name`` the current task, if it is not."""
        if name == self.current_task and name not in self.committed_tasks:
            self.refuse_sharded("import_task")
        elif name in self.tasks:
            raise TaskError(
                f"Task {name!r} is in the pool and committed, so its block cannot be replaced: choose another name."
            )
        else:
            self.add_task(name, **block)

    def _imported(self) -> None:
        self.pool_config.inference_mode = False
        self.prompt_router.routing.forget(self.pool_name)
        self.refresh_trainable()

    def _chosen(self, weights: Mapping[str, float] | Sequence[float] | Tensor) -> list[float]:
        """``weights`` as one number per task."""
        if isinstance(weights, Mapping):
            chosen = [0.0] * len(self.tasks)
            for name, weight in weights.items():
                chosen[self.index_of(name)] = float(weight)
        else:
            given = torch.as_tensor(weights).float()
            if given.dim() > 1 and given.shape[0] > 1:
                raise WeightsError(
                    f"export_mixture got weights of shape {list(given.shape)}: one adapter is one mixture, so pass a "
                    "single row of them."
                )
            chosen = given.flatten().tolist()
        if len(chosen) != len(self.tasks) or not torch.tensor(chosen).isfinite().all() or not any(chosen):
            raise WeightsError(
                f"export_mixture got weights {chosen}: give one finite number for each of the tasks {self.tasks}, not "
                "all of them 0."
            )
        return chosen

    def _soft_prompts(self) -> SoftPrompts:
        return self.model.soft_prompts  # type: ignore[return-value]

    def _prompts(self) -> list[Tensor]:
        """Soft prompts [P, d] of the tasks, oldest first."""
        prompts = self._soft_prompts()
        return prompts.parts("sapt_prompt", self.pool_name, self.sizes_of(prompts))

    def _layers(self) -> dict[str, SaptLayer]:
        """Target layers of the active pool by the names that their base layers had in the base model."""
        return {k: m for k, m in self.model.named_modules() if isinstance(m, SaptLayer) and m.holds(self.pool_name)}

    def _factors(self) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """By layer: (A, B) of each task, oldest first."""
        found = {}
        for key, layer in self._layers().items():
            sizes = self.sizes_of(layer)
            a, b = (layer.parts(attr, self.pool_name, sizes) for attr in ("sapt_A", "sapt_B"))
            found[key] = [(a_t, b_t.T) for a_t, b_t in zip(a, b, strict=True)]
        return found

    def _lora_config(self, r: int, alpha: float, use_rslora: bool = False) -> LoraConfig:
        config, layers = self.pool_config, self._layers()
        conv = any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values())
        lora = LoraConfig(
            task_type=config.task_type,
            base_model_name_or_path=config.base_model_name_or_path,
            r=r,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
            use_rslora=use_rslora,
            target_modules=sorted(target_names(self.model, set(layers))),
            fan_in_fan_out=conv,
            inference_mode=True,
        )
        saved = {name.rsplit(".", 1)[-1] for name, _ in self._wrapped()}
        lora.modules_to_save = sorted(saved) or None
        return lora

    def _wrapped(self) -> list[tuple[str, Any]]:
        wrappers = ((k, m) for k, m in self.model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper))
        return [(k, m) for k, m in wrappers if self.pool_name in m._adapters]

    def _saved_modules(self) -> dict[str, Tensor]:
        """Heads and other modules saved in full with the pool, by the names PEFT gives them in a file."""
        return {
            f"base_model.model.{name}.{key}": tensor
            for name, wrapper in self._wrapped()
            for key, tensor in wrapper.adapter_state_dict(self.pool_name, wrapper.state_dict()).items()
        }


def target_names(model: nn.Module, adapted: set[str]) -> set[str]:
    """Short names for ``target_modules`` if they match exactly the ``adapted`` modules, else the full ones."""
    short = {name.rsplit(".", 1)[-1] for name in adapted}
    matched = {k for k, m in model.named_modules() if k.rsplit(".", 1)[-1] in short and hasattr(m, "weight")}
    return short if matched == adapted else adapted
