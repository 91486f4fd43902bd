"""The command line as a user meets it: what it does, what a YAML file does, and what wrong input is answered with."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.bench import SMALL, save_model, save_tasks
from helpers.paths import environment
from peft_sapt.cli import main
from peft_sapt.cli.options import CommaList
from peft_sapt.continual.options import Budget, Data


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> Path:
    return save_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def ask(model, tasks, tmp_path, monkeypatch):
    """Call a command with the tiny model and tasks; give its exit code and all that it wrote."""
    monkeypatch.chdir(tmp_path)

    def call(*args: object, source: bool = True) -> tuple[int, str]:
        own = ["--model", str(model), "--tasks-dir", str(tasks), *SMALL] if source else []
        result = CliRunner().invoke(main, [*map(str, args), *own])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return call


def test_train_eval_and_look_into_the_pool(ask, tmp_path) -> None:
    code, text = ask("train", "--method", "sapt-ridge", "--out", "out")
    assert code == 0, text
    assert re.search(r"sapt-ridge: validation [\d.]+, AP [\d.]+, F.Ra -?[\d.]+", text)
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(result["matrix"]) == 2 and result["settings"]["budget"]["layers"] == 1
    assert result["provenance"]["commit"] is None or len(result["provenance"]["commit"]) >= 40
    code, text = ask("train", "--method", "sapt-ridge", "--out", "out")
    assert code == 0 and "nothing to do" in text
    code, text = ask("eval", "out/model", "--out", "scores.json")
    assert code == 0, text
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert [scores[n]["score"] for n in scores] == pytest.approx(result["matrix"][-1])
    assert [scores[n]["constrained"] for n in scores] == pytest.approx(result["constrained"][-1])
    assert [scores[n]["routing %"] for n in scores] == pytest.approx(result["routing"])
    code, text = ask("pool", "show", "out/model", source=False)
    assert code == 0 and "2 tasks" in text and re.search(r"first +4 +8 +0 +16  committed", text), text
    code, text = ask("pool", "verify", "out/model", source=False)
    assert code == 0 and "are what was saved" in text


def test_eval_takes_plain_adapters_too(ask) -> None:
    assert ask("train", "--method", "sequential", "--out", "out")[0] == 0
    code, text = ask("eval", "out/model")
    assert code == 0 and "score" in text and "routing" not in text


def test_another_run_is_not_taken_for_the_one_that_is_there(ask, tmp_path) -> None:
    assert ask("train", "--method", "sequential", "--out", "out")[0] == 0
    for other in (("--method", "sapt-ridge"), ("--method", "sequential", "--seed", 1),
                  ("--method", "sequential", "--order", "reversed")):  # fmt: skip
        code, text = ask("train", "--out", "out", *other)
        assert code == 1 and f"other settings ({other[-2][2:]})" in text, text
    assert "LORA" in (tmp_path / "out" / "model" / "adapter_config.json").read_text()


def test_the_base_learns_nothing_and_leaves_no_model(ask, tmp_path) -> None:
    code, text = ask("train", "--method", "base", "--out", "out")
    assert code == 0 and "Model:" not in text and not (tmp_path / "out" / "model").exists(), text


@pytest.mark.parametrize("method", ["per-task", "o-lora", "l2p"])
def test_what_other_methods_learn_is_saved(ask, tmp_path, method: str) -> None:
    code, text = ask("train", "--method", method, "--out", "out")
    assert code == 0, text
    saved = tmp_path / "out" / "model"
    files = {path.relative_to(saved).as_posix() for path in saved.rglob("*.*")}
    expected = {
        "per-task": "task_1/adapter_model.safetensors",
        "o-lora": "task_1/adapter_model.safetensors",
        "l2p": "virtual_tokens.safetensors",
    }
    assert expected[method] in files, files


def test_bench_writes_results_and_report(ask, tmp_path) -> None:
    args = ("bench", "--methods", "sequential,sapt-ridge", "--seeds", "0,1", "--out", "b", "--name", "tiny")
    code, text = ask(*args, "--dry-run")
    assert code == 0 and "6 runs" in text and text.count("to do") == 6 and not (tmp_path / "b").exists()
    code, text = ask(*args)
    assert code == 0, text
    found = json.loads((tmp_path / "b" / "tiny" / "results.json").read_text())
    assert [e["method"] for e in found["summary"]] == ["sequential", "per-task", "sapt-ridge"]
    assert all(e["FWT"] is not None for e in found["summary"] if e["method"] != "per-task")
    assert (tmp_path / "b" / "tiny" / "report" / "report.md").exists()
    code, text = ask(*args, "--dry-run")
    assert text.count("done  ") == 6
    code, text = ask("report", "b/tiny", "--out", "r", "--formats", "csv", "--no-pictures", source=False)
    assert code == 0
    names = ("methods", "tasks", "tasks_constrained", "settings", "provenance", "numbers")
    written = {p.name for p in (tmp_path / "r").iterdir()}
    assert written == {"report.md", *(f"{name}.csv" for name in names)}


def test_yaml_and_flags_set_the_same_fields(ask, tmp_path) -> None:
    """What --dry-run prints is a config file; it means what the flags meant, and flags go before it."""
    flags = ("--rows", "7", "--lr", "0.25", "--methods", "sapt,replay", "--seeds", "3,4", "--tasks", "second,first")
    code, text = ask("bench", *flags, "--dry-run")
    assert code == 0, text
    printed = yaml.safe_load(text.split("\n2 tasks")[0])
    assert set(printed) >= {item.name for cls in (Data, Budget) for item in fields(cls)}
    assert printed["rows"] == 7 and printed["tasks"] == ["second", "first"] and printed["definitions"] is False
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({k: v for k, v in printed.items() if v is not None}))
    again = ask("bench", "--config", "run.yaml", "--dry-run", source=False)
    assert again == (code, text)
    changed = ask("bench", "--config", "run.yaml", "--rows", "5", "--dry-run", source=False)[1]
    assert "rows: 5" in changed and "rows: 7" not in changed
    (tmp_path / "dashes.yaml").write_text("max-tokens: 33\n")
    assert (
        "max_tokens: 33"
        in ask("train", "--config", "dashes.yaml", "--tasks-dir", printed["tasks_dir"], "--dry-run", source=False)[1]
    )


def test_a_benchmark_sets_what_was_not_set(ask, tasks, tmp_path) -> None:
    def shown(*args: str) -> dict:
        code, text = ask("train", "--tasks-dir", tasks, "--dry-run", *args, source=False)
        assert code == 0, text
        return yaml.safe_load(text.split("\n2 tasks")[0])

    assert shown()["metric"] == "exact" and shown()["max_answer"] == 6
    named = shown("--benchmark", "superni")
    assert named["metric"] == "rougeL" and named["max_answer"] == 50 and named["head"].startswith("Definition: ")
    assert shown("--benchmark", "superni", "--metric", "exact")["metric"] == "exact"
    (tmp_path / "c.yaml").write_text("max_answer: 9\nbenchmark: superni\n")
    assert shown("--config", "c.yaml")["max_answer"] == 9


WRONG = {
    "command": (["trian"], r"No such command 'trian'. Did you mean 'train'\?"),
    "option": (["train", "--task-dir", "x"], r"No such option.*--tasks-dir"),
    "number": (["train", "--rows", "many"], r"'many' is not a valid integer"),
    "too small": (["train", "--rows", "0"], r"--rows is 0: it must be at least 1"),
    "choice": (["train", "--metric", "bleu"], r"'bleu' is not one of 'exact', 'rougeL'"),
    "list": (["bench", "--seeds", "0,,1"], r"not a list of values separated by commas"),
    "folder": (["train", "--tasks-dir", "nowhere"], r"There is no folder nowhere"),
    "no source": (["train"], r"No tasks: give --tasks-dir FOLDER or --dataset NAME"),
    "two sources": (["train", "--tasks-dir", ".", "--dataset", "me/mine"], r"both given: choose one"),
    "task": (["train", "--tasks-dir", "{tasks}", "--tasks", "first,third"], r"lacks \['third.train'.*tasks there"),
    "method": (["bench", "--tasks-dir", "{tasks}", "--methods", "ewc"], r"There is no method \['ewc'\]: choose among"),
    "order": (["bench", "--tasks-dir", "{tasks}", "--orders", "order3"], r"There is no order \['order3'\]: choose"),
    "sub-stream": (
        ["bench", "--tasks-dir", "{tasks}", "--benchmark", "superni", "--orders", "order1"],
        r"None of the benchmark's tasks is there",
    ),
    "two orders": (
        ["bench", "--tasks-dir", "{tasks}", "--benchmark", "superni", "--orders", "order1", "--tasks", "first"],
        r"--tasks and a benchmark's order \(\['order1'\]\) were both given",
    ),
    "order without source": (["train", "--benchmark", "superni", "--order", "order1"], r"No tasks: give --tasks-dir"),
    "model": (
        ["train", "--tasks-dir", "{tasks}", "--model", "no/such-model"],
        r"Model 'no/such-model' cannot be loaded",
    ),
    "head": (["train", "--tasks-dir", "{tasks}", "--head", "Q: "], r"lacks \{definition\}: put it in"),
    "config key": (["train", "--config", "key.yaml"], r"unknown option 'max_token'. Did you mean 'max_tokens'\?"),
    "config value": (["train", "--config", "value.yaml"], r"'many' is not a valid integer"),
    "config syntax": (["train", "--config", "syntax.yaml"], r"cannot be read as YAML"),
    "config kind": (["train", "--config", "kind.yaml"], r"holds no options"),
    "config missing": (["train", "--config", "nowhere.yaml"], r"'nowhere.yaml' does not exist"),
    "out": (["train", "--tasks-dir", "{tasks}", "--out", "key.yaml"], r"key.yaml is a file"),
    "pool": (["pool", "show", "nowhere"], r"nowhere holds no adapter_model.safetensors"),
    "adapter": (["eval", "nowhere", "--tasks-dir", "{tasks}"], r"nowhere holds no adapter_config.json"),
    "results": (["report", "empty"], r"empty holds no results"),
    "results file": (["report", "broken"], r"broken/x.json is not the result of a run"),
    "format": (["report", "empty", "--formats", "md,pdf"], r"There is no format \['pdf'\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_answered_in_one_line_that_helps(case: str, ask, tasks, tmp_path) -> None:
    (tmp_path / "key.yaml").write_text("max_token: 3\n")
    (tmp_path / "value.yaml").write_text("rows: many\n")
    (tmp_path / "syntax.yaml").write_text("rows: [1\n")
    (tmp_path / "kind.yaml").write_text("- rows\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.json").write_text('{"method": "sapt"}')
    arguments, message = WRONG[case]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    code, text = ask(*(str(a).replace("{tasks}", str(tasks)) for a in arguments), source=False)
    assert code in (1, 2) and "Traceback" not in text, text
    assert re.search(message, " ".join(text.split())), text
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before, "nothing is written"


def test_results_of_other_settings_are_not_overwritten(ask, tmp_path) -> None:
    assert ask("train", "--method", "base", "--out", "out")[0] == 0
    kept = (tmp_path / "out" / "results.json").read_bytes()
    code, text = ask("train", "--method", "base", "--out", "out", "--rows", "4")
    assert code == 1 and "was made with other settings (data, rows)" in " ".join(text.split())
    assert (tmp_path / "out" / "results.json").read_bytes() == kept


def test_a_damaged_pool_does_not_verify(ask, tmp_path) -> None:
    assert ask("train", "--method", "sapt-ridge", "--out", "out")[0] == 0
    path = tmp_path / "out" / "model" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if tensors[n].ndim == 2)
    for change, message in (
        ({name: tensors[name] + 1}, "1 tensors are changed"),
        ({"stray": tensors[name].clone()}, "1 tensors are unknown"),
    ):
        save_file({**tensors, **change}, path)
        code, text = ask("pool", "verify", "out/model", source=False)
        assert code == 1 and message in text
    path.write_bytes(b"no tensors")
    code, text = ask("pool", "show", "out/model", source=False)
    assert code == 1 and "claims a header larger than any pool's" in text


def test_lists_come_as_text_or_as_lists() -> None:
    numbers = CommaList(int)
    assert numbers.convert("1,2", None, None) == numbers.convert([1, 2], None, None) == [1, 2]


def run_in_terminal(*args: str, cwd: Path) -> tuple[int, str]:
    """A command in a terminal of its own, and all that it showed."""
    script = [sys.executable, "-c", "from peft_sapt.cli import main; main(prog_name='peft-sapt')", *args]
    main_end, own_end = pty.openpty()
    fcntl.ioctl(own_end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    env = {k: v for k, v in environment(COLUMNS="100", TERM="xterm").items() if k != "TQDM_DISABLE"}
    process = subprocess.Popen(script, stdin=own_end, stdout=own_end, stderr=own_end, cwd=cwd, env=env, close_fds=True)
    os.close(own_end)
    shown = b""
    while True:
        try:
            chunk = os.read(main_end, 65536)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    return process.wait(), shown.decode(errors="replace")


@pytest.mark.slow
def test_in_a_terminal_it_shows_progress(model, tasks, tmp_path) -> None:
    source = ["--model", str(model), "--tasks-dir", str(tasks), *SMALL]
    code, text = run_in_terminal("bench", "--methods", "sapt-ridge", "--out", "b", *source, cwd=tmp_path)
    assert code == 0, text
    for bar in ("run 1 of 2:", "SAPT: task 1 of", "learning first", "one LoRA per task: task 1"):
        assert bar in text, text[-3000:]
    assert "{'loss'" not in text and "FutureWarning" not in text, "lines of others stay out"
    code, text = run_in_terminal("--help", cwd=tmp_path)
    assert code == 0 and "bench" in text
    code, text = run_in_terminal("train", "--rows", "x", cwd=tmp_path)
    assert code == 2 and "Traceback" not in text


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_comes_from_the_library(shell: str, tmp_path) -> None:
    script = [sys.executable, "-c", "from peft_sapt.cli import main; main(prog_name='peft-sapt')"]
    asked = environment(_PEFT_SAPT_COMPLETE=f"{shell}_source")
    source = subprocess.run(script, env=asked, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert source.returncode == 0 and "peft-sapt" in source.stdout, source.stderr
    asked = environment(_PEFT_SAPT_COMPLETE=f"{shell}_complete", COMP_WORDS="peft-sapt bench --tas")
    asked |= {"COMP_CWORD": "--tas" if shell == "fish" else "2"}
    found = subprocess.run(script, env=asked, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "--tasks-dir" in found.stdout, found.stderr


def test_what_the_trainer_logs_reaches_report_to(ask, monkeypatch) -> None:
    from transformers import TrainerCallback, integrations

    logged = []

    class Spy(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append((args.run_name, logs))

    monkeypatch.setitem(integrations.integration_utils.INTEGRATION_TO_CALLBACK, "spy", Spy)
    code, text = ask("train", "--method", "sequential", "--out", "out", "--report-to", "spy")
    assert code == 0, text
    assert {name for name, _ in logged} == {"first", "second"} and any("train_loss" in logs for _, logs in logged)


@pytest.fixture
def pool(ask, tmp_path) -> Path:
    assert ask("train", "--method", "sapt-ridge", "--out", "out")[0] == 0
    return tmp_path / "out" / "model"


def test_parts_leave_a_pool_as_the_model_itself_exports_them(ask, pool, model, tmp_path) -> None:
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), pool)
    loaded.export_task("first", tmp_path / "expected")
    loaded.export_mixture([0.25, 0.75], tmp_path / "mixed")
    code, text = ask("pool", "export", pool, "one", "--task", "first", source=False)
    assert code == 0, text
    assert ask("pool", "export", pool, "mix", "--mixture", "first=0.25,second=0.75", source=False)[0] == 0
    for mine, theirs in (("one", "expected"), ("mix", "mixed")):
        left, right = (load_file(tmp_path / f / "adapter_model.safetensors") for f in (mine, theirs))
        assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    code, text = ask("pool", "export", pool, "one", "--task", "first", source=False)
    assert code == 2 and "nothing is overwritten" in text
    assert "Give either --task NAME or --mixture" in ask("pool", "export", pool, "x", source=False)[1]
    assert "not of the form" in ask("pool", "export", pool, "x", "--mixture", "first", source=False)[1]
    code, text = ask("pool", "export", pool, "x", "--task", "third", source=False)
    assert code == 1 and "third" in text and not (tmp_path / "x").exists()


def test_pools_change_into_new_folders(ask, pool, tmp_path) -> None:
    before = {p.name: p.read_bytes() for p in pool.iterdir() if p.is_file()}
    code, text = ask("pool", "remove", pool, "first", "small", source=False)
    assert code == 0 and "with the tasks second" in text, text
    assert ask("pool", "export", pool, "lora", "--task", "first", source=False)[0] == 0
    code, text = ask("pool", "import", "small", "lora", "grown", "--name", "again", source=False)
    assert code == 0 and "second, again" in text, text
    code, text = ask("pool", "diff", pool, "grown", source=False)
    assert code == 1 and "- first" in text and "+ again" in text and "tensors changed" in text
    assert ask("pool", "diff", pool, pool, source=False) == (0, "The pools are equal.\n")
    assert {p.name: p.read_bytes() for p in pool.iterdir() if p.is_file()} == before
