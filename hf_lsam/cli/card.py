"""`hf-lsam card`: the model card of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from ..files import write_atomically

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command()
@click.argument("run_dir", type=FOLDER)
@click.option("--against", multiple=True, type=FOLDER, help="Another run's folder to compare with; may be repeated.")
@click.option("--license", "license_", help="The license of the model, as the Hub names it.")
@click.option("--language", multiple=True, help="A language of the data, as two letters; may be repeated.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="[default: RUN_DIR/README.md]")
@click.option("--overwrite", is_flag=True, help="Replace a card that was written by hand.")
def card(
    run_dir: Path,
    against: tuple[Path, ...],
    license_: str | None,
    language: tuple[str, ...],
    output: Path | None,
    overwrite: bool,
) -> None:
    """Writes the model card for the Hub, from the run's record (or a recipe's card.json) and the saved model.

    RUN_DIR is the run's output_dir.
    """
    from ..card import MARK, comparison, facts_of_run, model_card

    output = output or run_dir / "README.md"
    try:
        if output.exists() and MARK not in output.read_text() and not overwrite:
            raise ValueError(
                f"{output} was not written by hf-lsam, and the card would replace it. Choose another file with "
                "--output, or pass --overwrite."
            )
        facts = facts_of_run(run_dir)
        if against:
            facts = replace(facts, **comparison(facts, [facts_of_run(other) for other in against]))
        write_atomically(output, str(model_card(facts, license=license_, language=list(language) or None)))
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{output}: {len(facts.metrics)} results, {len(facts.configuration)} fields of the configuration")
