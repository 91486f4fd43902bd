"""The part of a pool's model card that tells how to load it; PEFT writes the rest of README.md."""

from __future__ import annotations

import os
from pathlib import Path

from .files import write_atomically

MARK = "<!-- peft-sapt: usage -->"


def add_usage(folder: str | os.PathLike, tasks: list[str]) -> None:
    """Append loading instructions and the list of ``tasks`` to the card in ``folder``; replace an older block.

    A pool saved without a card (PEFT writes none on a worker process) is left without one.
    """
    card = Path(folder) / "README.md"
    if not card.exists():
        return
    text = card.read_text(encoding="utf-8").split(MARK)[0].rstrip()
    listed = "\n".join(f"- `{name}`" for name in tasks)
    usage = f"""
{MARK}
## Loading this SAPT pool

The method lives in the package `peft-sapt`; without its import PEFT raises `KeyError: 'SAPT'`.

```python
import peft_sapt
from peft import AutoPeftModelForCausalLM  # or AutoPeftModelForSeq2SeqLM

model = AutoPeftModelForCausalLM.from_pretrained("path/or/hub-id-of-this-folder")
```

Tasks in the pool, oldest first. No task name is needed to answer a prompt.

{listed}
"""
    write_atomically(card, (text + "\n" + usage).encode())
