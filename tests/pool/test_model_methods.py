"""Methods of a user's PeftModel are replaced in one place, on the instance, and by nothing that is in the way."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch.nn.modules import module as torch_modules

from helpers.tiny import padded, tiny_llama, token_rows
from helpers.training import fresh_pool, trainer
from helpers.words import tokenizer
from peft_sapt import ArmCallback, SaptConfig
from peft_sapt.pool.model_methods import REPLACED


def shadowed(model) -> set[tuple[str, str]]:
    """Methods of a class that an instance within ``model`` has replaced for itself: (class, name)."""
    return {
        (type(module).__name__, name)
        for module in model.modules()
        for name, value in vars(module).items()
        if callable(value) and callable(getattr(type(module), name, None))
    }


def test_methods_are_replaced_in_one_place_alone(tmp_path) -> None:
    """On the PeftModel, for its card and for options at load, once it is built; reading or saving adds none.

    Plain LoRA is the control: PEFT and transformers replace some methods of an instance themselves.
    """
    kinds = {"lora": LoraConfig(task_type="CAUSAL_LM"), "pool": SaptConfig(task_type="CAUSAL_LM", task_name="a")}
    models = {name: get_peft_model(tiny_llama(), config) for name, config in kinds.items()}
    replaced = {("PeftModelForCausalLM", name) for name in REPLACED if name != "generate"}  # it has a task type
    assert shadowed(models["pool"]) - shadowed(models["lora"]) == replaced
    for name, model in models.items():
        get_peft_model_state_dict(model)
        model.save_pretrained(tmp_path / name)
        model.generate(**padded(token_rows([4])), max_new_tokens=1)
        model.load_adapter(tmp_path / name, "again")
        model.delete_adapter("again")
    assert shadowed(models["pool"]) - shadowed(models["lora"]) == replaced
    run = trainer(fresh_pool(), tmp_path / "run", "a", [ArmCallback(tokenizer(), replay="rows")], max_steps=1)
    run.train()
    assert {pair for pair in shadowed(run.model) if pair[1] in REPLACED} == replaced


def test_the_look_for_a_peft_model_is_in_nobodys_way() -> None:
    """torch goes through its registration hooks while modules are built, when none may come or go."""
    hooks = torch_modules._global_module_registration_hooks
    count = len(hooks)
    inject_adapter_in_model(SaptConfig(task_type="CAUSAL_LM", tasks=["a", "b"]), tiny_llama())  # without a PeftModel
    seen: list[str] = []
    other = torch_modules.register_module_module_registration_hook(lambda parent, name, child: seen.append(name))
    try:
        torch.nn.Sequential(torch.nn.Linear(2, 2))
        model = get_peft_model(tiny_llama(), SaptConfig(task_type="CAUSAL_LM"))
    finally:
        other.remove()
    assert len(hooks) == count and "base_model" in seen
    assert ("PeftModelForCausalLM", "create_or_update_model_card") in shadowed(model)
