"""`arm-hf app`: a page to try photos and words on."""

from __future__ import annotations

from typing import Annotated

import typer

from arm_hf import DEFAULT_MODEL

from .common import one_line_errors, quiet_libraries


def app(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="The embedded model, a local folder, or a hub id; may be repeated, visitors then choose one.  "
            f"[default: {DEFAULT_MODEL}]"
        ),
    ] = None,
    compensation: Annotated[
        str | None,
        typer.Option(metavar="ID|DIR", help="Offer sharpening with this Stable Diffusion checkpoint, as in CLIPer."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen at; 0.0.0.0 for the whole network.  [default: this machine]")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port.  [default: the first free one from 7860]")] = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page in this machine's browser.")] = False,
    longest_side: Annotated[int, typer.Option(help="Larger photos are reduced to this side.")] = 1280,
    most_labels: Annotated[int, typer.Option(help="Most labels of one request.")] = 40,
    queue: Annotated[int, typer.Option(help="Visitors that may wait at a time.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto: as the model was saved.")
    ] = "float32",
    space: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Do not open the page; write the folder of a Hub Space that shows it."),
    ] = None,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error comes from, for a bug report.")
    ] = False,
) -> None:
    """Open a page in the browser: drop a photo, type words, see what is where.

    Only this machine can see it, unless --host says otherwise. Requests are limited in size and number, and all files
    of visitors live in one temporary folder that goes when the page does.
    """
    with one_line_errors(traceback):
        if space is not None:
            from arm_hf.app.space import write_space

            for path in write_space(space, model or [DEFAULT_MODEL], compensation):
                typer.echo(path)
            return
        from arm_hf.app import require_gradio
        from arm_hf.app.limits import Limits

        require_gradio()
        limits = Limits(longest_side=longest_side, labels=most_labels, queue=queue)
        quiet_libraries()
        from arm_hf.app.page import serve
        from arm_hf.app.work import Workshop

        serve(Workshop(model or [DEFAULT_MODEL], compensation, limits, device, dtype), host, port, browser)
