"""Where a result comes from: versions, machine, time, and the commit of these sources."""

from __future__ import annotations

import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("peft-sapt", "torch", "transformers", "peft")


def environment() -> dict[str, Any]:
    """Versions of the packages that matter, the machine, the time in UTC, and the commit or None."""
    return {
        **{name: installed(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout that tracks this very file, "-dirty" after it if a source differs; None elsewhere."""
    own, folder = Path(__file__).name, Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    if git("ls-files", "--error-unmatch", own) is None:
        return None
    changed = git("status", "--porcelain", "--", str(folder.parent))
    head = git("rev-parse", "HEAD")
    return f"{head}-dirty" if head and changed else head
