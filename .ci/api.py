"""The API reference as HTML, from the docstrings: python .ci/api.py FOLDER. Fails if a page gives a warning."""

from __future__ import annotations

import pkgutil
import sys
import typing
import warnings
from pathlib import Path

import pdoc
import peft

import peft_sapt
import peft_sapt.hub
from peft_sapt.continual.frozen_prefix import KnownRow
from peft_sapt.ops.devtools.compile_check import Compiled, Variant
from peft_sapt.ops.devtools.timings import Timing
from peft_sapt.routing.moments import Moments
from peft_sapt.routing.prompts import Prompts
from peft_sapt.routing.soft_prompts import Inserted

INTERNAL = (
    "peft_sapt.cli.",
    "peft_sapt.ops.kernels",
    "peft_sapt.ops.triton_kernel",
    "peft_sapt.ops.devtools.compile_check",
)


def modules() -> list[str]:
    """Every module of the package but the command line's and those in Triton's language."""
    found = (info.name for info in pkgutil.walk_packages(peft_sapt.__path__, "peft_sapt."))
    return ["peft_sapt", *sorted(name for name in found if not f"{name}.".startswith(INTERNAL))]


def build(folder: Path) -> list[str]:
    """Write the pages; the names of the modules they cover. Warnings are errors."""
    for name in ("Optional", "Union"):  # names in annotations that SaptConfig inherits from PEFT as text
        setattr(peft_sapt.config, name, getattr(typing, name))
    for name in ("TaskType", "PeftType"):
        setattr(peft_sapt.config, name, getattr(peft, name))
    for cls in (
        Compiled,
        Inserted,
        KnownRow,
        Moments,
        Prompts,
        Timing,
        Variant,
    ):  # a named tuple's constructor does not know its module's names
        cls.__new__.__annotations__ = typing.get_type_hints(cls)
    for name in peft_sapt.hub.__all__:  # which are imported when asked for
        setattr(peft_sapt.hub, name, getattr(peft_sapt.hub, name))
    names = modules()
    pdoc.render.configure(docformat="google", show_source=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*may refer to either")  # run beside the sources
        warnings.filterwarnings("ignore", message=".*has already been added")  # by its package
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        pdoc.pdoc(*names, output_directory=folder)
    return names


if __name__ == "__main__":
    print(f"{len(build(Path(sys.argv[1])))} pages in {sys.argv[1]}")
