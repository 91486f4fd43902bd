"""What a process costs before it does anything: the console script looks into files without torch, and importing the
package makes SAPT a method of PEFT at once."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import environment
from helpers.tiny import build_pool, padded, token_rows

LIMIT = 0.5  # seconds of CPU
SCRIPT = Path(sys.executable).parent / "peft-sapt"
FILES_ALONE = (
    ("--help",),
    ("--version",),
    ("pool", "--help"),
    ("pool", "show", "--help"),
    ("train", "--help"),
    ("bench", "--help"),
    ("eval", "--help"),
    ("report", "--help"),
    ("pool", "export", "--help"),
    ("pool", "push", "--help"),
    ("pool", "show", "POOL"),
    ("pool", "verify", "POOL"),
    ("pool", "diff", "POOL", "POOL"),
    ("pool", "show", "nothing-here"),
    ("nonsense",),
)  # the last two are errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model, path = build_pool("llama", ["a", "b"]), tmp_path_factory.mktemp("pool")
    model.commit_task(inputs=[padded(token_rows([4, 5]))])
    model.save_pretrained(path)
    return path


def script_in(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
    """Run the console script, and report which heavy modules were imported as it ended."""
    code = (
        "import atexit, json, runpy, sys\n"
        f"sys.argv = [{str(SCRIPT)!r}, *{[str(a) for a in arguments]!r}]\n"
        "heavy = ('torch', 'transformers', 'peft', 'huggingface_hub', 'pandas', 'datasets')\n"
        "told = lambda: print('HEAVY', json.dumps([n for n in heavy if n in sys.modules]), file=sys.stderr)\n"
        "atexit.register(told)\n"
        "from peft_sapt.cli import main\n"
        "main()\n"
    )
    own = environment(**variables)
    return subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", FILES_ALONE, ids=" ".join)
def test_looking_into_files_takes_no_torch(folder, arguments) -> None:
    done = script_in(*(folder if a == "POOL" else a for a in arguments))
    assert done.stderr.splitlines()[-1] == "HEAVY []", done.stderr
    assert "Traceback" not in done.stderr


def test_completion_takes_no_torch() -> None:
    for typed, offered in (("peft-sapt po", "pool"), ("peft-sapt pool ve", "verify")):
        words = typed.split()
        done = script_in(_PEFT_SAPT_COMPLETE="bash_complete", COMP_WORDS=typed, COMP_CWORD=str(len(words) - 1))
        assert offered in done.stdout and done.stderr.splitlines()[-1] == "HEAVY []", done.stderr


@pytest.mark.skipif(not SCRIPT.exists(), reason="the console script is not installed beside this interpreter")
@pytest.mark.parametrize(
    "arguments", [a for a in FILES_ALONE if a[-1] not in ("nothing-here", "nonsense")], ids=" ".join
)
def test_the_console_script_is_quick(folder, arguments) -> None:
    """The least of three, since the first of all may compile its files."""
    own = [str(folder) if a == "POOL" else a for a in arguments]
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([SCRIPT, *own], env=environment(), check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    print(f"{' '.join(arguments)}: {min(seconds):.2f} s")
    assert min(seconds) <= LIMIT


@pytest.mark.parametrize("argv", ["[]", "['']", "['peft-sapt.py']", "['tests']", "None"])
def test_the_import_makes_the_method_known_at_once(argv: str) -> None:
    """Whatever else may be in sys.argv."""
    code = (
        f"import sys; sys.argv = {argv}\n"
        "import peft_sapt\n"
        "from peft import PeftType, get_peft_config\n"
        "assert PeftType.SAPT == 'SAPT' and get_peft_config({'peft_type': 'SAPT'}).router == 'attention'\n"
        "from peft_sapt import SaptConfig, save_pool\n"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_in_the_console_script_too_everything_is_there_when_it_is_asked_for() -> None:
    code = (
        f"import sys; sys.argv = [{str(SCRIPT)!r}]\n"
        "import peft_sapt\n"
        "assert 'torch' not in sys.modules\n"
        "from peft_sapt import SaptConfig\n"
        "from peft import PeftType; assert PeftType.SAPT == 'SAPT'\n"
        "try: peft_sapt.nonsense\n"
        "except AttributeError as error: assert 'nonsense' in str(error)\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_a_process_that_the_script_has_started_has_the_whole_package(tmp_path) -> None:
    """Workers that are spawned get the script's arguments, and unpickle what needs the method."""
    (tmp_path / "peft-sapt").write_text(
        "import multiprocessing, sys\n"
        "def known(_):\n"
        "    import peft_sapt\n"
        "    return 'torch' in sys.modules\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as workers:\n"
        "        print(workers.map(known, [0]))\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "peft-sapt"], env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "[True]", done.stderr


def test_choices_that_help_shows_are_those_there_are() -> None:
    """They stand once more where no torch is imported."""
    from peft_sapt.cli import report
    from peft_sapt.continual import labels, methods, options, scoring
    from peft_sapt.report import FORMATS

    assert tuple(FORMATS) == report.FORMATS and tuple(scoring.METRICS) == options.METRICS
    assert labels.LABELS.keys() == methods.METHODS.keys()
