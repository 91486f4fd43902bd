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

from ..errors import LoraFolderError, TaskError, WeightsError
from ..pool_module import PoolModule, replace_part
from ..storage.lora_folder import Factors, read_lora, write_lora
from ..storage.prompt_folder import read_prompt, write_prompt
from .lifecycle import add_task
from .view import Batches, Pool

Shares = Mapping[str, float] | Sequence[float] | Tensor  # one number per task, or by name


def export_task(pool: Pool, name: str, folder: str | os.PathLike) -> None:
    """See [`SaptModel.export_task`]."""
    pool.refuse_sharded("export_task")
    index, config = pool.index_of(name), pool.config
    if config.block == "prompt":
        write_soft_prompt(pool, folder, prompts_of(pool)[index])
        return
    rank, alpha = config.task_ranks[index], config.task_alphas[index]
    factors = {key: pair[index] for key, pair in factors_of(pool).items()}
    write_lora(folder, lora_config(pool, rank, alpha, use_rslora=config.use_rslora), factors, saved_modules(pool))


def export_mixture(pool: Pool, weights: Shares, folder: str | os.PathLike) -> None:
    """See [`SaptModel.export_mixture`]."""
    pool.refuse_sharded("export_mixture")
    config, chosen = pool.config, chosen_weights(pool, weights)
    if config.block == "prompt":
        prompts = torch.stack([prompt.float() for prompt in prompts_of(pool)])  # [T, P, d]
        write_soft_prompt(pool, folder, torch.einsum("t,tpd->pd", torch.tensor(chosen).to(prompts), prompts))
        return
    kept = [i for i, weight in enumerate(chosen) if weight]
    scales = [chosen[i] * config.scalings[i] for i in kept]
    factors: Factors = {}
    for key, pairs in factors_of(pool).items():
        a = torch.cat([pairs[i][0].float() for i in kept])  # [R, in]
        b = torch.cat([pairs[i][1].float() * s for i, s in zip(kept, scales, strict=True)], dim=1)  # [out, R]
        factors[key] = (a, b)
    rank = sum(config.task_ranks[i] for i in kept)
    write_lora(folder, lora_config(pool, rank, rank), factors, saved_modules(pool))


def import_task(pool: Pool, name: str, folder: str | os.PathLike, inputs: Batches | None = None) -> None:
    """See [`SaptModel.import_task`]."""
    pooled = pool.pooled_prompts([] if inputs is None else inputs)
    pool.refuse_bad_rows("import_task(inputs=...)", pooled)
    if pool.config.block == "prompt":
        import_prompt(pool, name, folder, pooled)
        return
    lora = read_lora(folder)
    layers = pool.layers()
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
    config = pool.config
    alpha = lora.scaling * (lora.r**0.5 if config.use_rslora else lora.r)
    make_current(pool, name, r=lora.r, lora_alpha=alpha)
    for key, layer in layers.items():
        block = layer.new_block(lora.r)
        if key in lora.factors:
            a, b = lora.factors[key]
            block = {"sapt_A": a, "sapt_B": b.T}
        for attr, value in block.items():
            replace_newest(layer, attr, pool.adapter, value)
    config.task_ranks = [*config.task_ranks[:-1], lora.r]
    config.task_alphas = [*config.task_alphas[:-1], alpha]
    after_import(pool, pooled)


# --- parts -----------------------------------------------------------------------------------------------------------


def import_prompt(pool: Pool, name: str, folder: str | os.PathLike, pooled: Tensor) -> None:
    """[`import_task`] for a soft prompt."""
    config, prompts = pool.config, pool.hooks.prompts
    assert prompts is not None
    prompt = read_prompt(folder, config.num_virtual_tokens, config.token_dim or 0)
    make_current(pool, name)
    replace_newest(prompts, "sapt_prompt", pool.adapter, prompt)
    after_import(pool, pooled)


def make_current(pool: Pool, name: str, **block: Any) -> None:
    """Make ``name`` the current task, if it is not."""
    if name == pool.current_task and not pool.is_committed:
        pool.refuse_sharded("import_task")
    elif name in pool.tasks:
        raise TaskError(
            f"Task {name!r} is in the pool and committed, so its block cannot be replaced: choose another name."
        )
    else:
        add_task(pool, name, **block)


def replace_newest(module: PoolModule, attr: str, adapter: str, value: Tensor) -> None:
    """Put ``value``, of any rank, in the place of a module's newest part."""
    weight = getattr(module, attr)[adapter].weight
    replace_part(getattr(module, attr), adapter, value.to(weight.device, weight.dtype))


def after_import(pool: Pool, pooled: Tensor) -> None:
    """Let the pool know that its newest block is another one now, and the task's prompts ``pooled`` [n, d], if any."""
    pool.memory.show_own_config(pool.adapter).inference_mode = False
    pool.memory.forget(pool.adapter)
    if len(pooled):
        pool.statistics.fit(pool.adapter, pooled)
        pool.memory.remember_fitted(pool.adapter, pooled)
    pool.memory.training_of(pool.adapter).block_is_imported = True
    pool.refresh_trainable()


def chosen_weights(pool: Pool, weights: Shares) -> list[float]:
    """``weights`` as one number per task."""
    if isinstance(weights, Mapping):
        chosen = [0.0] * len(pool.tasks)
        for name, weight in weights.items():
            chosen[pool.index_of(name)] = float(weight)
    else:
        given = torch.as_tensor(weights).float()
        if given.dim() > 1 and given.shape[0] > 1:
            raise WeightsError(
                f"export_mixture got weights of shape {list(given.shape)}: one adapter is one mixture, so pass a "
                "single row of them."
            )
        chosen = given.flatten().tolist()
    if len(chosen) != len(pool.tasks) or not torch.tensor(chosen).isfinite().all() or not any(chosen):
        raise WeightsError(
            f"export_mixture got weights {chosen}: give one finite number for each of the tasks {pool.tasks}, not "
            "all of them 0."
        )
    return chosen


def prompts_of(pool: Pool) -> list[Tensor]:
    """Soft prompts [P, d] of the tasks, oldest first."""
    prompts = pool.hooks.prompts
    assert prompts is not None
    return prompts.parts("sapt_prompt", pool.adapter, pool.sizes_of(prompts))


def write_soft_prompt(pool: Pool, folder: str | os.PathLike, prompt: Tensor) -> None:
    write_prompt(folder, prompt, pool.config.task_type, pool.config.base_model_name_or_path)


def factors_of(pool: Pool) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """By layer: (A, B) of each task, oldest first."""
    found = {}
    for key, layer in pool.layers().items():
        sizes = pool.sizes_of(layer)
        a, b = (layer.parts(attr, pool.adapter, sizes) for attr in ("sapt_A", "sapt_B"))
        found[key] = [(a_t, b_t.T) for a_t, b_t in zip(a, b, strict=True)]
    return found


def lora_config(pool: Pool, r: int, alpha: float, use_rslora: bool = False) -> LoraConfig:
    """PEFT's config of a plain LoRA of rank ``r`` on the pool's target modules."""
    layers = pool.layers()
    conv = any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values())
    lora = LoraConfig(
        task_type=pool.config.task_type,
        base_model_name_or_path=pool.config.base_model_name_or_path,
        r=r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]  # PEFT takes floats, as older adapters have
        use_rslora=use_rslora,
        target_modules=sorted(target_names(pool.base, set(layers))),
        fan_in_fan_out=conv,
        inference_mode=True,
    )
    saved = {name.rsplit(".", 1)[-1] for name, _ in wrapped_modules(pool)}
    lora.modules_to_save = sorted(saved) or None
    return lora


def wrapped_modules(pool: Pool) -> list[tuple[str, Any]]:
    """Heads and other modules that are saved in full with the pool, by name."""
    wrappers = ((k, m) for k, m in pool.base.named_modules() if isinstance(m, AuxiliaryTrainingWrapper))
    return [(k, m) for k, m in wrappers if pool.adapter in m._adapters]


def saved_modules(pool: Pool) -> dict[str, Tensor]:
    """Their tensors, by the names PEFT gives them in a file."""
    return {
        f"base_model.model.{name}.{key}": tensor
        for name, wrapper in wrapped_modules(pool)
        for key, tensor in wrapper.adapter_state_dict(pool.adapter, wrapper.state_dict()).items()
    }


def target_names(model: nn.Module, adapted: set[str]) -> set[str]:
    """Short names for ``target_modules`` if they match exactly the ``adapted`` modules, else the full ones."""
    short = {name.rsplit(".", 1)[-1] for name in adapted}
    matched = {k for k, m in model.named_modules() if k.rsplit(".", 1)[-1] in short and hasattr(m, "weight")}
    return short if matched == adapted else adapted
