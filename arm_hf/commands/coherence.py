"""`arm-hf coherence`: how coherent the patches of each layer are."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from arm_hf import DEFAULT_MODEL

from .common import one_line_errors, quiet_libraries


def coherence(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A folder with images/, labels/, classes.json, or a standard tree.")
    ],
    layout: Annotated[str | None, typer.Option(help="Which standard data set it is, such as voc21.")] = None,
    split: Annotated[str, typer.Option(help="Which list of names: val for val.txt.")] = "val",
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first so many images.")] = None,
    model: Annotated[str, typer.Option(help="The embedded model, a local folder, or a hub id.")] = DEFAULT_MODEL,
    size: Annotated[int | None, typer.Option(help="Shorter side in pixels that the network sees.")] = None,
    templates: Annotated[str | None, typer.Option(help="Sentences for the class names, as for segment.")] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Write the numbers to this JSON file, too.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Measure how coherent the patches of each layer are on labelled images, and so find the layer of `cra_dsi`."""
    with one_line_errors():
        if out is not None and os.path.exists(out) and not overwrite:
            raise ValueError(f"{out} is there already; choose another --out, or pass --overwrite")
        from arm_hf.data import open_data

        images = open_data(data, split, layout=layout)
        if limit is not None:
            images = images.select(range(min(limit, len(images))))

        from tqdm import tqdm

        from arm_hf.coherence import measure_coherence
        from arm_hf.folders import atomic_path
        from arm_hf.segmenting import load_pipeline

        quiet_libraries()
        pipe = load_pipeline(model, device=device)
        report = measure_coherence(
            pipe, images, size, templates, progress=lambda rows: tqdm(rows, unit="image", disable=None)
        )
        for line in report.table():
            typer.echo(line)
        if out is not None:
            record = {"model": model, "data": data, "split": split, "size": size, **report.record()}
            with atomic_path(out) as path:
                path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            typer.echo(f"numbers: {out}")
