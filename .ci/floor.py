"""The lowest versions that setup.cfg allows, as constraints for pip: python .ci/floor.py [NAME TO LEAVE OUT ...]."""

from __future__ import annotations

import configparser
import sys
from pathlib import Path


def lowest(leave_out: list[str]) -> list[str]:
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg")
    lines = filter(None, map(str.strip, config["options"]["install_requires"].splitlines()))
    pairs = (line.split(";")[0].split(">=") for line in lines)
    return [f"{name.strip()}=={version.strip()}" for name, version in pairs if name.strip() not in leave_out]


if __name__ == "__main__":
    print("\n".join(lowest(sys.argv[1:])))
