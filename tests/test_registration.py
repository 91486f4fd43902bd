"""Importing the package makes SAPT a PEFT type, loads nothing heavy, and can be done twice."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys

import pytest
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

import peft_sapt
from helpers.tiny import build_pool
from peft_sapt import SaptConfig, SaptModel


def test_the_enum_member_behaves_like_a_native_one() -> None:
    member = PeftType("SAPT")
    assert member is PeftType["SAPT"] is PeftType.SAPT
    assert isinstance(member, PeftType) and member == "SAPT" and member.value == "SAPT" and member.name == "SAPT"
    assert hash(member) == hash("SAPT") and member in list(PeftType) and "SAPT" in PeftType.__members__
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member and copy.copy(member) is member
    assert json.dumps({"peft_type": member}) == '{"peft_type": "SAPT"}'


def test_the_tables_know_the_method() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SAPT"] is SaptConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["SAPT"] is SaptModel


def test_a_second_import_changes_nothing() -> None:
    before = list(PeftType)
    importlib.reload(importlib.import_module("peft_sapt.registration")).register(SaptConfig, SaptModel)
    assert list(PeftType) == before


def test_the_config_survives_its_file(tmp_path) -> None:
    config = SaptConfig(
        task_type="CAUSAL_LM", tasks=["a", "b"], task_ranks=[2, 3], target_modules=["v_proj", "q_proj"]
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() and isinstance(loaded, SaptConfig)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]


def test_without_the_import_peft_names_the_missing_method(tmp_path) -> None:
    model = build_pool("llama", ["a", "b"])
    model.save_pretrained(tmp_path)
    model.unload().save_pretrained(tmp_path / "base")
    code = (
        "from transformers import AutoModelForCausalLM; from peft import PeftModel\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r})\n"
        f"try: PeftModel.from_pretrained(base, {str(tmp_path)!r})\n"
        "except KeyError as error: print('without the import:', error)\n"
        f"import peft_sapt; print(PeftModel.from_pretrained(base, {str(tmp_path)!r}).tasks)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.splitlines() == ["without the import: 'SAPT'", "['a', 'b']"], run.stderr
    assert "KeyError: 'SAPT'" in (tmp_path / "README.md").read_text()


def test_the_import_stays_light() -> None:
    # what PEFT itself imports is not ours to save: it takes Triton along where that is installed
    code = "import sys, peft; a = set(sys.modules); import peft_sapt; b = set(sys.modules) - a; "
    code += "print({m.split('.')[0] for m in b} & set(sys.argv[1:]), 'peft_sapt.ops.triton_kernel' in b)"
    heavy = ["datasets", "triton", "matplotlib", "gradio", "trl", "rouge_score", "gguf"]
    run = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set() False"


def test_public_names() -> None:
    for name in peft_sapt.__all__:
        assert getattr(peft_sapt, name) is not None
    assert peft_sapt.PeftModel is PeftModel


@pytest.mark.parametrize("field", ["r", "lora_alpha", "lora_dropout", "query_dim"])
def test_paper_defaults(field: str) -> None:
    expected = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.0, "query_dim": 100}
    assert getattr(SaptConfig(), field) == expected[field]
