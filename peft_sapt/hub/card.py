"""README.md of a saved pool: front matter for the Hub, then a section of ours between two marks.

PEFT and transformers write README.md themselves, at a save, at ``push_to_hub`` and at the end of a Trainer's run. This
is called after each of them: it replaces its own section, drops the empty template they start from, and leaves what a
user wrote.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..storage.atomic import write_atomically
from ..storage.manifest import manifest_of
from ..version import METHOD
from .card_text import CardData, is_hub_id, section
from .heatmap import can_draw, heatmap_png

BEGIN, END = "<!-- peft-sapt: begin -->", "<!-- peft-sapt: end -->"
PICTURE = "attention.png"
TAGS = ("peft", "sapt", "continual-learning")
TEMPLATED = (  # lines that PEFT and transformers add to the empty template
    "### Framework versions",
    "- PEFT ",
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub.",
)


def write_card(folder: str | os.PathLike, config: dict[str, Any], repo_id: str | None = None) -> None:
    """Write README.md, and attention.png if there is an attention to show, of the pool saved in ``folder``.

    Args:
        config: values of its adapter_config.json.
        repo_id: where it will be on the Hub, if known.

    Raises:
        PoolFormatError: the weights file in ``folder`` cannot be read.
    """
    folder = Path(folder)
    path, weights = folder / "README.md", folder / SAFETENSORS_WEIGHTS_NAME
    manifest = (manifest_of(weights) if weights.is_file() else None) or {}
    attention = manifest.get("attention") if manifest.get("tasks") == config["tasks"] else None
    picture = draw(folder, config["tasks"], attention)
    data = CardData(config, manifest, attention, PICTURE if picture else None, repo_id, folder)
    card = ModelCard(path.read_text(encoding="utf-8")) if path.is_file() else ModelCard("---\n{}\n---\n")
    fill_front_matter(card.data, config)
    before, after = around(card.text)
    parts = [part for part in (before, f"{BEGIN}\n{section(data)}\n{END}", after) if part]
    card.text = "\n" + "\n\n".join(parts) + "\n"
    write_atomically(path, str(card).encode())


def refresh_card(folder: str | os.PathLike, repo_id: str | None = None) -> None:
    """Write our section of the card in ``folder`` again, if a pool is saved there."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("peft_type") == METHOD:
        write_card(folder, config, repo_id)


def clean_card(path: Path, config: dict[str, Any]) -> None:
    """Take a local path out of the front matter of PEFT's card at ``path``, if it is of this pool's base model."""
    name = config.get("base_model_name_or_path")
    if not path.is_file() or is_hub_id(name):
        return
    card = ModelCard(path.read_text(encoding="utf-8"))
    theirs = os.path.normpath(str(card.data.get("base_model"))) == os.path.normpath(str(name))
    if theirs and card.data.get("library_name") == "peft":
        fill_front_matter(card.data, config)
        write_atomically(path, str(card).encode())


def draw(folder: Path, tasks: list[str], attention: list[Any] | None) -> bool:
    """Keep attention.png in step with ``attention``; whether there is such a picture."""
    if attention is None or not any(attention) or len(tasks) < 2 or not can_draw():
        (folder / PICTURE).unlink(missing_ok=True)  # one of an earlier state would show what is no longer so
        return False
    rows = tuple(None if row is None else tuple(row) for row in attention)
    write_atomically(folder / PICTURE, heatmap_png(tuple(tasks), rows))
    return True


def fill_front_matter(data: Any, config: dict[str, Any]) -> None:
    """Library, tags and base model, as the Hub's filters want them; other keys stay."""
    data.library_name = "peft"
    name = config.get("base_model_name_or_path")
    tags = [tag for tag in data.tags or [] if not str(tag).startswith("base_model:")]
    data.base_model = name if is_hub_id(name) else None
    linked = [f"base_model:adapter:{name}"] if is_hub_id(name) else []
    data.tags = sorted({*tags, *TAGS, *linked})


def around(text: str) -> tuple[str, str]:
    """What stands before and after our section; without the lines of an untouched template."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return tuple("" if is_template(part) else part.strip() for part in (before, after))  # type: ignore[return-value]  # of two parts


def is_template(text: str) -> bool:
    lines = {line.strip() for line in text.splitlines()} - {""}
    return all(line in template_lines() or line.startswith(TEMPLATED) for line in lines)


@lru_cache(maxsize=1)
def template_lines() -> frozenset[str]:
    return frozenset(line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines())
