"""`arm-hf card`: write the card of a model folder anew from its config and its results."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import one_line_errors


def card(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Model folder, or folder of a run.")],
    repo_id: Annotated[str | None, typer.Option(metavar="ORG/NAME", help="Repository that its examples name.")] = None,
    results: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Results of arm-hf evaluate. Default: results.json in DIR.")
    ] = None,
    license: Annotated[str, typer.Option(metavar="ID", help="Licence of the weights.")] = "apache-2.0",
    dataset: Annotated[list[str] | None, typer.Option(metavar="ORG/NAME", help="Training data on the Hub.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a card that somebody wrote.")] = False,
) -> None:
    """Build the card (README.md) of a model folder anew."""
    with one_line_errors():
        from arm_hf.folder_cards import CardRequest, write_card
        from arm_hf.publishing import find_model

        request = CardRequest(results or (), (), license, dataset or ())
        typer.echo(f"card: {write_card(find_model(model), repo_id, request, overwrite)}")
