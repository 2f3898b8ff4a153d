"""`arm-hf data`: whether a data set is complete and sound, and where to get what is missing."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from .common import ExitCode, one_line_errors, printable


def data(
    source: Annotated[
        str | None,
        typer.Argument(metavar="[DATA]", help="A folder, or a hub id owner/name; without it: what layouts there are."),
    ] = None,
    layout: Annotated[str | None, typer.Option(help="Which standard data set it is, such as voc21.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="train, val, ...; can be given several times.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Decode only the first so many images of a split.")] = None,
    show: Annotated[int, typer.Option(min=1, help="Print at most so many problems of a split.")] = 10,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that decode; one per processor.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Of a hub data set: where the images are.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Of a hub data set: where the label maps are.")] = None,
    labels_from: Annotated[
        str | None, typer.Option(help="Of a hub data set: its classes, a label set or a text file.")
    ] = None,
) -> None:
    """Check a data set: what is missing, malformed or out of range, and what to download from where."""
    with one_line_errors():
        if source is None:
            _print_layouts(layout)
            return

        from tqdm import tqdm

        from arm_hf.data.checking import check_folder, check_hub
        from arm_hf.data.hub import looks_like_hub_id

        def progress(rows):
            return tqdm(rows, unit="image", disable=None, leave=False)

        if image_column is not None or (not os.path.exists(source) and layout is None and looks_like_hub_id(source)):
            from arm_hf.label_sets import labels_from as read_labels

            names = [label.name for label in read_labels(labels_from)] if labels_from is not None else None
            report = check_hub(
                source,
                split[0] if split else "validation",
                limit,
                progress,
                image_column=image_column,
                label_column=label_column,
                label_names=names,
                layout=layout,
            )
        else:
            report = check_folder(source, split, layout, limit, workers, progress)
        for line in report.lines(show):
            typer.echo(printable(line))
        if not report.sound:
            raise typer.Exit(ExitCode.INCOMPLETE)


def _print_layouts(layout: str | None) -> None:
    from arm_hf.data.checking import download_lines
    from arm_hf.data.layouts import LAYOUTS
    from arm_hf.data.standard_trees import get_layout

    for known in [get_layout(layout)] if layout is not None else LAYOUTS.values():
        typer.echo(f"{known.name:<14} {known.num_classes:>4} classes  {known.title}")
        if layout is not None:
            for tree in known.trees:
                lists = f", lists {' or '.join(tree.names)}" if tree.names else ""
                typer.echo(f"  {'/'.join(tree.splits)}: images {tree.images}, labels {tree.labels}{lists}")
            for line in download_lines(known):
                typer.echo(line)
