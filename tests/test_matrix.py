"""What a PEFT method is expected to do, on every family of models; plain LoRA goes through the same as a control.

The guide's table of models is checked against this matrix: a cell is tested, refused, or stands in ``UNTESTED``.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_model_status

from helpers.paths import ROOT
from helpers.tiny import assert_real_pool, padded
from helpers.zoo import CASES, METHODS, ROWS, TASKS, base_of, batch_of, loss_of, out, result, sapt, weights_for
from peft_sapt.errors import SaptError

Model = PeftModel
GUIDE = ROOT / "peft_sapt" / "SUPPORT.md"


def base_out(name: str, model: Model) -> torch.Tensor:
    with torch.no_grad(), model.disable_adapter():
        return result(model(**batch_of(name)))


def forward(name: str, model: Model, folder: Path) -> None:
    """Adapted output differs from the base's; a row does not depend on its batch mates or on padding."""
    whole = out(name, model)
    assert whole.isfinite().all() and not torch.allclose(whole, base_out(name, model), atol=1e-3)
    if CASES[name].task_type is None:
        return
    if sapt(model):
        weights = model.attention_weights(**padded(ROWS))
        assert_real_pool(weights)
        wide = model.attention_weights(**padded(ROWS, "left", 7))
        torch.testing.assert_close(wide, weights, atol=1e-6, rtol=0)
    positioned = CASES[name].task_type == "SEQ_2_SEQ_LM" or name.startswith("BERT, f")
    for i, row in enumerate(ROWS):
        alone = out(name, model, [row])[0]
        length = len(alone) if positioned or name.endswith("sequence") else len(row)
        torch.testing.assert_close(whole[i][:length][: len(row)], alone[:length][: len(row)], atol=1e-4, rtol=1e-3)


def fresh_is_identity(name: str, model: Model, folder: Path) -> None:
    """A new adapter changes nothing until it is trained."""
    start = {"init_weights": True} if sapt(model) else {"init_lora_weights": True}
    fresh = METHODS["sapt" if sapt(model) else "lora"](name, **start)
    torch.testing.assert_close(out(name, fresh), base_out(name, fresh), atol=1e-6, rtol=1e-5)


def training(name: str, model: Model, folder: Path) -> None:
    """A step moves the newest block, and neither the base nor older blocks."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    loss_of(name, model, **(weights_for(name, len(ROWS)) if sapt(model) else {})).backward()
    optimizer.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    parts = {match[1] for k in moved if (match := re.search(r"\.(sapt_\w+|lora_[AB]|modules_to_save)\.", k))}
    assert moved and all(re.search(r"\.(sapt_|lora_|modules_to_save)", k) for k in moved)
    if sapt(model):
        assert {"sapt_A", "sapt_B"} <= parts and not parts & {"sapt_old_A", "sapt_old_B", "sapt_old_keys"}
        assert CASES[name].task_type is None or "sapt_key" in parts


def save_and_load(name: str, model: Model, folder: Path) -> None:
    """Bitwise the same model after a save and a load, also with low_cpu_mem_usage; safetensors alone."""
    expected = out(name, model)
    model.save_pretrained(folder)
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    for low in (False, True):
        loaded = PeftModel.from_pretrained(base_of(name), folder, low_cpu_mem_usage=low).eval()
        assert torch.equal(out(name, loaded), expected)


def generation(name: str, model: Model, folder: Path) -> None:
    """Greedy tokens of a left-padded batch are those of each row alone without a cache."""
    options = {"max_new_tokens": 5, "do_sample": False}
    whole = model.generate(**padded(ROWS, "left"), **options)
    for i, row in enumerate(ROWS):
        alone = model.generate(**padded([row]), use_cache=False, **options)
        new = alone[0, 0 if CASES[name].task_type == "SEQ_2_SEQ_LM" else len(row) :]
        found = whole[i, 0 if CASES[name].task_type == "SEQ_2_SEQ_LM" else max(map(len, ROWS)) :]
        stop = min(len(new), len(found))
        assert torch.equal(found[:stop], new[:stop])


def checkpointing(name: str, model: Model, folder: Path) -> None:
    """Gradients under gradient checkpointing are the plain ones."""
    model.train()
    extra = weights_for(name, len(ROWS)) if sapt(model) else {}
    cache = {} if CASES[name].task_type in (None, "QUESTION_ANS", "TOKEN_CLS", "SEQ_CLS") else {"use_cache": False}
    if name.startswith("BERT"):
        cache = {}
    found = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad(set_to_none=True)
        loss_of(name, model, **extra, **cache).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = found
    assert plain.keys() == recomputed.keys() and len(plain) >= 4
    for key, gradient in plain.items():
        assert float((recomputed[key] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-8, key


def switching(name: str, model: Model, folder: Path) -> None:
    """A second adapter is added, used, switched away from and deleted; the first is as before."""
    config = copy.deepcopy(model.peft_config["default"])
    if sapt(model):
        config.tasks, config.task_name = ["a", "b", "other"], "other"
    expected = out(name, model)
    model.add_adapter("another", config)
    assert torch.equal(out(name, model), expected)
    model.set_adapter("another")
    assert not torch.allclose(out(name, model), expected, atol=1e-4)
    if sapt(model):
        assert model.tasks == ["a", "b", "other"]
    model.set_adapter("default")
    model.delete_adapter("another")
    assert torch.equal(out(name, model), expected)
    assert not [k for k in model.state_dict() if ".another" in k]
    status = get_model_status(model)
    assert status.active_adapters == ["default"] and status.available_adapters == ["default"]


def unloading(name: str, model: Model, folder: Path) -> None:
    """``unload`` gives the base model back; merging a pool is refused, and nothing is changed by that."""
    expected, adapted = base_out(name, model), out(name, model)
    if sapt(model):
        with pytest.raises(SaptError, match="export_mixture"):
            model.merge_and_unload()
        assert torch.equal(out(name, model), adapted)
    base = model.unload()
    assert not [k for k in base.state_dict() if "sapt" in k or "lora" in k]
    with torch.no_grad():
        assert torch.equal(result(base(**batch_of(name))), expected)


def copying(name: str, model: Model, folder: Path) -> None:
    """deepcopy and pickle, also after a forward, give an equal and independent model."""
    expected = out(name, model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(out(name, twin), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
    assert torch.equal(out(name, model), expected)


def bfloat16(name: str, model: Model, folder: Path) -> None:
    """On a base in bfloat16 the output has its dtype and is near the float32 one; adapter weights stay float32."""
    expected = out(name, model)
    model.save_pretrained(folder)
    low = PeftModel.from_pretrained(base_of(name).to(torch.bfloat16), folder).eval()
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in batch_of(name).items()}
    with torch.no_grad():
        found = result(low(**inputs, **(weights_for(name, len(ROWS)) if sapt(low) else {})))
    assert found.dtype == torch.bfloat16
    distance = float((found.float() - expected).norm())
    assert distance < 0.1 * float(expected.norm())
    assert distance < 0.5 * float((base_out(name, model) - expected).norm()), "the base alone would pass too"
    assert {p.dtype for n, p in low.named_parameters() if ".sapt_" in n or ".lora_" in n} == {torch.float32}


def export(name: str, model: Model, folder: Path) -> None:
    """Each task is a plain LoRA of the same output; a plain LoRA saves and loads as ever."""
    if not sapt(model):
        return save_and_load(name, model, folder)
    for task in TASKS:
        model.export_task(task, folder / task)
        plain = PeftModel.from_pretrained(base_of(name), folder / task).eval()
        torch.testing.assert_close(out(name, plain), out(name, model, sapt_task=task), atol=1e-5, rtol=1e-4)


BEHAVIOURS: dict[str, Callable[[str, Model, Path], None]] = {
    "forward": forward,
    "identity": fresh_is_identity,
    "training": training,
    "save, load": save_and_load,
    "generate": generation,
    "checkpointing": checkpointing,
    "switch": switching,
    "unload": unloading,
    "copy": copying,
    "bfloat16": bfloat16,
    "export": export,
}
# cells that a model's kind does not have
VOID = {(name, "generate") for name, case in CASES.items() if not case.generates}
VOID |= {("nn.Module", "checkpointing")}
# cells without a test, and why
UNTESTED = {
    ("T5 v1.1", "generate"): "transformers 5.23 cannot generate with a decoder deeper than the encoder",
}
CELLS = [(n, b) for n in CASES for b in BEHAVIOURS if (n, b) not in VOID | UNTESTED.keys()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "behaviour"), CELLS, ids=lambda value: value.replace(" ", ""))
def test_cell(name: str, behaviour: str, method: str, tmp_path: Path) -> None:
    BEHAVIOURS[behaviour](name, METHODS[method](name), tmp_path)


def table() -> str:
    """The matrix as Markdown; the guide holds it word for word."""
    lines = ["| model | " + " | ".join(BEHAVIOURS) + " |", "|---|" + "---|" * len(BEHAVIOURS)]
    for name, case in CASES.items():
        cells = []
        for behaviour in BEHAVIOURS:
            void, left = (name, behaviour) in VOID, (name, behaviour) in UNTESTED
            cells.append("" if void else "untested" if left else "✓")
        lines.append(f"| {name}{f' ({case.task_type})' if case.task_type else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_guide_shows_this_matrix() -> None:
    assert table() in GUIDE.read_text(encoding="utf-8"), f"put this into {GUIDE.name}:\n{table()}"


def test_few_cells_are_untested() -> None:
    assert len(UNTESTED) <= 5 and all(UNTESTED.values())


def test_the_untested_generation_fails_without_an_adapter_too() -> None:
    with pytest.raises(IndexError):
        base_of("T5 v1.1").generate(**padded(ROWS), max_new_tokens=2)
