"""``peft-sapt report``: tables and pictures from results that are there."""

from __future__ import annotations

from pathlib import Path

import click

FORMATS = ("md", "tex", "csv")


@click.command("report")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the report; FOLDER/report by default.")
@click.option(
    "--formats",
    default=",".join(FORMATS),
    show_default=True,
    help="Table formats, separated by commas.",
)
@click.option("--pictures/--no-pictures", default=True, show_default=True, help="Heat-maps and curves too.")
def command(folder: Path, out: Path | None, formats: str, pictures: bool) -> None:
    """Make tables (Markdown, LaTeX, CSV), heat-maps, forgetting curves and pool growth from FOLDER's results."""
    from ..report.write import write_report

    chosen = formats.split(",")
    wrong = [name for name in chosen if name not in FORMATS]
    if wrong:
        raise click.BadParameter(f"There is no format {wrong}: choose among {list(FORMATS)}.", param_hint="--formats")
    click.echo(f"Report: {write_report(folder, out or folder / 'report', chosen, pictures)}")
