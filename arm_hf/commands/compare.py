"""`arm-hf compare`: several methods side by side on one photo."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from arm_hf import DEFAULT_MODEL

from .common import one_line_errors, quiet_libraries


def compare(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image file or http(s) address.")],
    labels: Annotated[str, typer.Option(help='What to look for: "cat, dog=puppy|hound, sky".')],
    methods: Annotated[str, typer.Option(help='"all", or methods separated by commas.')] = "all",
    arm: Annotated[str, typer.Option(metavar="off|on|both", help="Show the methods alone, with ARM, or both.")] = "off",
    out: Annotated[str, typer.Option(metavar="FILE", help="The grid picture (PNG).")] = "comparison.png",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the picture if it is there.")] = False,
    model: Annotated[str, typer.Option(help="The embedded model, a local folder, or a hub id.")] = DEFAULT_MODEL,
    background: Annotated[str | None, typer.Option(help="Background policy, as for segment.")] = None,
    size: Annotated[int | None, typer.Option(help="Shorter side in pixels that the network sees.")] = None,
    common_input: Annotated[
        bool,
        typer.Option("--common-input", help="Resize the position table for all methods alike: one pass, faster."),
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Run several methods on one photo: a grid picture and the time of each.

    Methods that resize CLIP's position table alike share a pass; as their codes have it, there are three ways.
    """
    with one_line_errors():
        from arm_hf.comparing import compare as run
        from arm_hf.comparing import grid, parse_methods
        from arm_hf.folders import atomic_path, read_image
        from arm_hf.modeling.prompts import parse_labels
        from arm_hf.segmenting import load_pipeline

        names, parsed = parse_methods(methods), parse_labels(labels)
        if os.path.exists(out) and not overwrite:
            raise ValueError(f"{out} is there already; choose another --out, or pass --overwrite")
        picture = read_image(image)
        quiet_libraries()
        pipe = load_pipeline(model, device=device)
        found = run(pipe, picture, parsed, names, arm=arm, background=background, size=size, common_input=common_input)
        with atomic_path(out) as path:
            grid(picture, found).save(path, format="PNG")
        typer.echo(f"shared trunk  {found.trunk_seconds * 1000:7.0f} ms")
        for result in found.results:
            typer.echo(f"{result.name:<24} {result.seconds * 1000:7.0f} ms more")
        for name, reason in found.left_out.items():
            typer.echo(f"arm-hf: left out {name}: {reason}", err=True)
        typer.echo(f"picture: {out}")
