"""The config that a user gives: kept where PEFT shows it, not changed by a pool that grows, and options at load."""

from __future__ import annotations

import copy
import json
import warnings
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from helpers.tiny import build_pool, commit, padded, tiny_llama, tiny_t5, token_rows
from peft_sapt import SaptConfig, save_pool
from peft_sapt.errors import SaptError

TASKS = ["a", "b", "c"]
ROWS = padded(token_rows([5, 8, 6]))


def base(hidden: int = 64):
    torch.manual_seed(0)
    return tiny_llama(hidden)


@pytest.mark.parametrize("block", ["lora", "prompt"])
def test_it_is_the_one_in_peft_config(block: str, tmp_path) -> None:
    config = SaptConfig(task_type="CAUSAL_LM", task_name="a", block=block)
    model = get_peft_model(base(), config)
    assert model.peft_config["default"] is config
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, config=config)
    assert loaded.peft_config["default"] is config and config.inference_mode
    assert loaded.base_model.peft_config is loaded.get_base_model().peft_config


def test_a_pool_that_grows_leaves_it_alone() -> None:
    config = SaptConfig(task_type="CAUSAL_LM", task_name="a")
    models = [get_peft_model(base(), config), get_peft_model(base(), config)]
    models[0].add_adapter("second", config)
    before = config.to_dict()
    commit(models[0])
    models[0].add_task("b")
    models[0].record_task("b", rows=3)
    assert config.to_dict() == before and models[1].tasks == ["a"]
    assert models[0].peft_config["default"].tasks == ["a", "b"] and models[0].peft_config["second"] is config
    assert get_peft_model(base(), config).tasks == ["a"]
    twin = copy.deepcopy(models[0])
    twin.commit_task([ROWS])
    twin.add_task("c")
    assert twin.peft_config["default"].tasks == ["a", "b", "c"] and models[0].tasks == ["a", "b"]
    models[0].set_adapter("second")
    assert models[0].tasks == ["a"]


def test_one_config_for_bases_of_several_widths() -> None:
    config = SaptConfig(task_type="CAUSAL_LM", task_name="a")
    for hidden in (64, 32, 64):
        model = get_peft_model(base(hidden), config)
        assert model.base_model.router.in_features == hidden == model.peft_config["default"].token_dim
    with pytest.raises(SaptError, match="token_dim is 48"):
        get_peft_model(base(), SaptConfig(task_type="CAUSAL_LM", token_dim=48))


@pytest.mark.parametrize("grown", [False, True])
def test_options_that_are_set_later_are_followed(grown: bool) -> None:
    """top_k by name, against the weights that it leaves; before and after the pool has a config of its own."""
    model = build_pool("llama", TASKS).eval()
    if grown:
        commit(model)
    weights = model.attention_weights(**ROWS)
    model.peft_config["default"].top_k = 1
    kept = torch.zeros_like(weights).scatter(1, weights.argmax(1, keepdim=True), weights.amax(1, keepdim=True))
    with torch.no_grad():
        found, expected = model(**ROWS).logits, model(**ROWS, sapt_weights=kept).logits
    torch.testing.assert_close(found, expected)
    model.peft_config["default"].r = 7
    if not grown:
        commit(model)
    model.add_task("d")
    assert model.peft_config["default"].task_ranks[-1] == 7


# --- options at load -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, value", [("top_k", 2), ("min_weight", 0.2), ("kernel", "reference"),
                                         ("lora_dropout", 0.25), ("old_block_gradient", False),
                                         ("answer_header", [5, 6])])  # fmt: skip
@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter", "config"])
def test_options_at_load_are_applied(name: str, value: object, way: str, tmp_path) -> None:
    build_pool("llama", TASKS).save_pretrained(tmp_path)
    fresh = build_pool("llama", TASKS).unload()
    if way == "config":
        config = SaptConfig.from_pretrained(tmp_path, **{name: value})
        model = PeftModel.from_pretrained(fresh, tmp_path, config=config)
    elif way == "from_pretrained":
        model = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True, **{name: value})
    else:
        model = PeftModel.from_pretrained(fresh, tmp_path)
        if name == "lora_dropout":
            with pytest.raises(SaptError, match=r"load_adapter\(lora_dropout=\.\.\.\).*from_pretrained"):
                model.load_adapter(tmp_path, "again", lora_dropout=value)
            return
        model.load_adapter(tmp_path, "again", **{name: value})
        model.set_adapter("again")
    assert getattr(model.peft_config[model.active_adapter], name) == value
    assert getattr(model.base_model.pool.config, name) == value
    if name == "lora_dropout" and way == "from_pretrained":
        assert any(isinstance(m, torch.nn.Dropout) and m.p == value for m in model.modules())


def test_a_fallback_at_load_answers_with_the_base_model(tmp_path) -> None:
    model = build_pool("llama", ["a"], router="ridge")
    commit(model)  # whose statistics tell what is near
    model.save_pretrained(tmp_path)
    fresh = model.unload()
    with torch.no_grad():
        plain = fresh(**ROWS).logits
        loaded = PeftModel.from_pretrained(fresh, tmp_path, fallback=1e6).eval()
        torch.testing.assert_close(loaded(**ROWS).logits, plain)
    assert not bool(loaded.attention_weights(**ROWS).any())


MISFITS = [({"fallback": "often"}, "fallback"), ({"top_k": 0}, "top_k"), ({"min_weight": "x"}, "min_weight"),
           ({"r": 9}, "saved with 4"), ({"tasks": ["x"]}, "saved with"), ({"router": "ridge"}, "router='ridge'"),
           ({"block": "prompt"}, "only top_k")]  # fmt: skip


@pytest.mark.parametrize("options, wanted", MISFITS)
def test_options_that_do_not_fit_are_refused_by_name(options, wanted: str, tmp_path) -> None:
    build_pool("llama", TASKS).save_pretrained(tmp_path)
    fresh = build_pool("llama", TASKS).unload()
    for read in (SaptConfig.from_pretrained, partial(PeftModel.from_pretrained, fresh)):
        with pytest.raises(SaptError, match=wanted):
            read(tmp_path, **options)
    model = PeftModel.from_pretrained(fresh, tmp_path)
    with pytest.raises(SaptError, match=wanted):
        model.load_adapter(tmp_path, "again", **options)
    assert "again" not in model.peft_config and model.tasks == TASKS


def test_values_as_saved_and_other_arguments_pass(tmp_path) -> None:
    model = build_pool("llama", TASKS)
    save_pool(model, tmp_path)
    fresh = build_pool("llama", TASKS).unload()
    same = {"r": 4, "tasks": TASKS, "local_files_only": True}
    loaded = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True, **same)
    assert loaded.tasks == TASKS


# --- as PEFT's own tests have it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [PeftConfig, SaptConfig])
def test_unknown_keys_are_told_and_ignored(reader, tmp_path) -> None:
    SaptConfig(task_name="a").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "foobar": 1, "spam": "x"}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['foobar', 'spam'\] for class SaptConfig"):
        config = reader.from_pretrained(tmp_path)
    assert isinstance(config, SaptConfig) and config.to_dict() == SaptConfig(task_name="a").to_dict()


def test_a_file_without_a_type_is_none_of_pefts(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"foo": "bar"}')
    for config in (SaptConfig, LoraConfig):  # the control
        with pytest.raises(TypeError, match=r"is missing required keys: {'peft_type'}"):
            config.from_pretrained(tmp_path)


@pytest.mark.parametrize("family, task_type", [(tiny_llama, "CAUSAL_LM"), (tiny_t5, "SEQ_2_SEQ_LM")])
@pytest.mark.parametrize("settings", [{}, {"router": "ridge"}, {"block": "prompt"}])
def test_every_tuner_layer_tells_its_widths(family, task_type, settings) -> None:
    model = get_peft_model(family(), SaptConfig(task_type=task_type, tasks=TASKS, **settings))
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert len(layers) > 1
    assert all(isinstance(m.in_features, int) and isinstance(m.out_features, int) and m.in_features for m in layers)
    assert model.base_model.router.out_features == 3


# --- a config that its user changes afterwards -----------------------------------------------------------------------

LATER = {"target_modules": ["v_proj"], "layers_to_transform": [0], "exclude_modules": ["q_proj"], "router": "ridge",
         "query_activation": "between", "query_dim": 7, "task_name": "b", "modules_to_save": ["lm_head"],
         "tasks": ["z"], "block": "prompt", "use_rslora": True}  # fmt: skip


@pytest.mark.parametrize("save", ["save_pool", "save_pretrained"])
@pytest.mark.parametrize("name", LATER)
def test_what_is_saved_is_the_pool_and_not_its_users_object(name: str, save: str, tmp_path) -> None:
    """A sweep that changes one config object for its next run."""
    torch.manual_seed(0)
    config = SaptConfig(task_type="CAUSAL_LM", tasks=["x", "a"], init_weights=False, temperature=0.1)
    model = get_peft_model(base(), config).eval()
    with torch.no_grad():
        expected = model(**ROWS).logits
        setattr(config, name, LATER[name])
        save_pool(model, tmp_path) if save == "save_pool" else model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*another save.*")
            loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
        torch.testing.assert_close(loaded(**ROWS).logits, expected)


@pytest.mark.parametrize("name, value", [("top_k", 0), ("top_k", -1), ("top_k", "2"), ("min_weight", 2.0),
                                         ("temperature", 0), ("temperature", -1.0), ("answer_header", []),
                                         ("answer_header", "abc"), ("kernel", "fast"),
                                         ("fallback", "often")])  # fmt: skip
@pytest.mark.parametrize("grown", [False, True])
def test_options_that_are_set_later_are_checked(name: str, value: object, grown: bool) -> None:
    model = build_pool("llama", TASKS).eval()
    if grown:
        commit(model)
    before = getattr(model.peft_config["default"], name)
    setattr(model.peft_config["default"], name, value)
    for _ in range(2):
        with pytest.raises(SaptError, match=name):
            model(**ROWS)
    setattr(model.peft_config["default"], name, before)
    assert model(**ROWS).logits.isfinite().all()


def test_a_rank_and_a_name_that_are_set_before_the_pool_is_built() -> None:
    config = SaptConfig(task_type="CAUSAL_LM", task_name="a")
    config.r, config.lora_alpha, config.task_name = 16, 8, "news"
    model = get_peft_model(base(), config)
    assert model.tasks == ["news"] and model.peft_config["default"].task_ranks == [16]
    assert {len(v) for k, v in model.task_state("news").items() if "sapt_A" in k} == {16}
    assert model.base_model.pool.config.scalings == [0.5]


def test_a_dropout_as_saved_passes_load_adapter(tmp_path) -> None:
    build_pool("llama", TASKS, lora_dropout=0.25).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build_pool("llama", TASKS).unload(), tmp_path)
    model.load_adapter(tmp_path, "again", lora_dropout=0.25)


@pytest.mark.parametrize("name", ["lora_alpha", "r"])
def test_a_scale_that_is_changed_in_a_file_is_told(name: str, tmp_path) -> None:
    """As people scale LoRA at inference: here it does nothing to blocks that are there."""
    model = build_pool("llama", TASKS).eval()
    save_pool(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: 64}))
    with pytest.warns(UserWarning, match=rf"{name}=64 in .* counts for tasks that are added from now on"):
        loaded = PeftModel.from_pretrained(build_pool("llama", TASKS).unload(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**ROWS).logits, model(**ROWS).logits)
