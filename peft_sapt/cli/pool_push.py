"""``peft-sapt pool push``: a saved pool to the Hub."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import SaptError
from .pool_file import verified


@click.command("push")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo_id")
@click.option("--private", is_flag=True, default=None, help="Make a private repository, if there is none yet.")
@click.option("--message", default="Upload SAPT pool", show_default=True, help="Message of the commit.")
def push(folder: Path, repo_id: str, private: bool | None, message: str) -> None:
    """Bring REPO_ID on the Hub to the state of the pool in FOLDER: what has changed, in one commit.

    Log in with `hf auth login`, or set HF_TOKEN.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    from ..compat import UNREACHABLE
    from ..hub.push import push_folder

    verified(folder)
    disable_progress_bars()  # what was sent is told below
    try:
        done = push_folder(folder, repo_id, private=private, message=message)
    except HfHubHTTPError as error:
        raise SaptError(f"The Hub refused {repo_id}: {str(error).strip().splitlines()[0]}") from error
    except UNREACHABLE as error:
        raise SaptError(f"The Hub at {constants.ENDPOINT} cannot be reached: {error}.") from error
    for what, paths in (("sent", done.sent), ("unchanged", done.unchanged), ("deleted", done.deleted)):
        if paths:
            click.echo(f"{what}: {', '.join(paths)}")
    click.echo(f"{done.sent_bytes} bytes in {len(done.sent)} files: {done.url}")
