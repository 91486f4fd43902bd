"""Pools go to the Hub and come back, through huggingface_hub and HTTP, against a server that checks what is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from helpers.committed import committed_pool
from helpers.hub_server import TOKEN, Hub
from helpers.paths import environment
from peft_sapt.errors import PoolFormatError
from peft_sapt.hub.card import BEGIN, END
from peft_sapt.hub.push import push_folder

REPO = "me/my-pool"
POOL = ["README.md", "adapter_config.json", "adapter_model.safetensors", "attention.png"]


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.close()
    assert not server.unknown, server.unknown


def work(hub: Hub, tmp_path: Path, action: str, repo: str = REPO, token: str = TOKEN) -> str:
    """Run one action of hub_worker.py as a user's process, with an empty cache."""
    cache = tmp_path / f"cache-{len(list(tmp_path.iterdir()))}"
    env = environment(
        HF_ENDPOINT=hub.url, HF_HOME=str(cache), HF_TOKEN=token, HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "helpers.hub_worker", action, repo, str(tmp_path)],
        env=env, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def same_logits(tmp_path: Path) -> bool:
    pushed, pulled = (load_file(tmp_path / f"{name}.safetensors")["logits"] for name in ("pushed", "pulled"))
    return torch.equal(pushed, pulled)


@pytest.mark.slow
def test_a_pool_goes_to_the_hub_grows_and_comes_back(hub: Hub, tmp_path) -> None:
    work(hub, tmp_path, "push")
    [first] = hub.repos[REPO].commits
    assert first.changed == POOL
    assert "['a', 'b']" in work(hub, tmp_path, "pull") and same_logits(tmp_path)
    card = ModelCard(first.files["README.md"].decode())
    assert "# my-pool" in card.text and f'"{REPO}"' in card.text and card.data.library_name == "peft"
    assert "More Information Needed" not in card.text

    work(hub, tmp_path, "again")
    assert len(hub.repos[REPO].commits) == 1, "nothing has changed, so nothing is committed"

    # a user writes into the card on the Hub; a push must keep it
    first.files["README.md"] = first.files["README.md"].replace(BEGIN.encode(), b"Ask me.\n\n" + BEGIN.encode())
    hub.requests.clear()
    work(hub, tmp_path, "grow")
    second = hub.repos[REPO].commits[-1]
    assert len(hub.repos[REPO].commits) == 2 and second.title == "one more task"
    assert second.changed == POOL, "one commit holds all that has changed"
    uploads = [r for r in hub.requests if r.method == "PUT"]
    assert sorted(r.body_bytes for r in uploads) == sorted(
        len(second.files[p]) for p in POOL if p.endswith(("s", "g"))
    )
    text = second.files["README.md"].decode()
    assert "Ask me." in text and text.count(END) == 1 and "<code>c</code>" in text
    assert "['a', 'b', 'c']" in work(hub, tmp_path, "pull") and same_logits(tmp_path)

    files = hub.repos[REPO].files
    files["adapter_model.bin"] = files.pop("adapter_model.safetensors")
    assert "in a pickle, which can run code" in work(hub, tmp_path, "refuse")


@pytest.mark.slow
def test_the_trainer_pushes_the_pool(hub: Hub, tmp_path) -> None:
    """push_to_hub=True at every save, then trainer.push_to_hub() once the task is committed."""
    work(hub, tmp_path, "train")
    files = hub.repos[REPO].files
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(files)
    card = files["README.md"].decode()
    assert card.count(BEGIN) == 1 and "<code>a</code>" in card and "## Training procedure" in card
    assert "['a']" in work(hub, tmp_path, "pull") and same_logits(tmp_path)


# --- peft-sapt pool push --------------------------------------------------------------------------------------------


def saved(tmp_path: Path, tasks: int = 3) -> Path:
    model = committed_pool()
    for name in "cb"[: 3 - tasks]:
        model.remove_task(name)
    folder = tmp_path / f"pool-{tasks}"
    model.save_pretrained(folder)
    (folder / "replay").mkdir()
    for name in model.tasks:
        (folder / "replay" / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    (folder / "notes.txt").write_text("not the pool's")
    return folder


def push(hub: Hub, folder: Path, **more):
    return push_folder(folder, REPO, token=TOKEN, endpoint=hub.url, **more)


@pytest.fixture
def online(monkeypatch, tmp_path) -> None:
    """Requests leave this process, through LFS, which the server speaks; no file comes from a cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)


def test_a_folder_is_brought_up_to_date_in_one_commit(hub: Hub, tmp_path, online) -> None:
    first = push(hub, saved(tmp_path, 2))
    assert first.sent == [*POOL, "replay/a.jsonl", "replay/b.jsonl"] and not first.unchanged
    grown = saved(tmp_path, 3)
    hub.requests.clear()
    second = push(hub, grown)
    assert second.sent == [*POOL, "replay/c.jsonl"] and second.unchanged == ["replay/a.jsonl", "replay/b.jsonl"]
    commits = hub.repos[REPO].commits
    assert len(commits) == 2 and commits[-1].changed == second.sent and "notes.txt" not in commits[-1].files
    sizes = {path: len(commits[-1].files[path]) for path in second.sent}
    assert second.sent_bytes == sum(sizes.values())
    on_the_wire = sum(r.body_bytes for r in hub.requests if r.method == "PUT")
    assert on_the_wire == sizes["adapter_model.safetensors"] + sizes["attention.png"]
    assert commits[-1].files["adapter_model.safetensors"] == (grown / "adapter_model.safetensors").read_bytes()
    third = push(hub, grown)
    assert not third.sent and third.sent_bytes == 0 and len(commits) == 2


def test_what_is_gone_here_goes_there_but_not_what_is_not_the_pools(hub: Hub, tmp_path, online) -> None:
    push(hub, saved(tmp_path, 3))
    hub.repos[REPO].commits[-1].files["LICENSE"] = b"MIT"
    done = push(hub, saved(tmp_path, 1))
    assert done.deleted == ["attention.png", "replay/b.jsonl", "replay/c.jsonl"]
    assert {"LICENSE", "replay/a.jsonl"} <= set(hub.repos[REPO].files)


def test_words_in_the_card_stay_whoever_wrote_them(hub: Hub, tmp_path, online) -> None:
    folder = saved(tmp_path, 2)
    push(hub, folder)
    files = hub.repos[REPO].files
    files["README.md"] = files["README.md"].replace(BEGIN.encode(), b"Said there.\n\n" + BEGIN.encode())
    push(hub, folder)
    assert b"Said there." in hub.repos[REPO].files["README.md"]
    path = folder / "README.md"
    path.write_text(path.read_text().replace(BEGIN, f"Said here.\n\n{BEGIN}"))
    push(hub, folder)
    assert b"Said here." in hub.repos[REPO].files["README.md"]
    assert path.read_text().count("path/or/hub-id"), "the local folder is left as it is"


def test_the_command_reports_what_it_sent(hub: Hub, tmp_path, online, monkeypatch) -> None:
    from click.testing import CliRunner

    from peft_sapt.cli.main import main

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = saved(tmp_path, 2)
    run = CliRunner().invoke(main, ["pool", "push", str(folder), REPO])
    assert run.exit_code == 0, run.output
    assert "sent: README.md, adapter_config.json" in run.output and " bytes in 6 files: http" in run.output
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    (folder / "replay" / "d.jsonl").write_text("{}\n")
    run = CliRunner().invoke(main, ["pool", "push", str(folder), REPO])
    assert run.exit_code == 1 and "The Hub refused me/my-pool: " in run.output and "401" in run.output
    with monkeypatch.context() as unreachable:
        unreachable.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        run = CliRunner().invoke(main, ["pool", "push", str(folder), REPO])
        assert run.exit_code == 1 and "http://127.0.0.1:9 cannot be reached" in run.output
    (folder / "adapter_model.safetensors").write_bytes(b"broken")
    run = CliRunner().invoke(main, ["pool", "push", str(folder), REPO])
    assert run.exit_code == 1 and "has too few bytes for a safetensors file" in run.output


def test_a_folder_without_a_pool_is_not_pushed(hub: Hub, tmp_path) -> None:
    with pytest.raises(PoolFormatError, match=r"no adapter_model.safetensors"):
        push(hub, tmp_path)
    assert not hub.requests
