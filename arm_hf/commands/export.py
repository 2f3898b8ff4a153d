"""`arm-hf export`: graphs for onnxruntime or torch.export."""

from __future__ import annotations

from typing import Annotated

import typer

from arm_hf import DEFAULT_MODEL

from .common import one_line_errors, quiet_libraries


def export(
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder of the graphs; it must be new or empty.")],
    format: Annotated[
        str, typer.Option(metavar="onnx|torch", help="Graphs for onnxruntime, or programs for torch.export.load.")
    ] = "onnx",
    model: Annotated[
        str, typer.Option(help="The embedded model, a local folder, or a hub id; an ARM checkpoint or a plain CLIP.")
    ] = DEFAULT_MODEL,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    method: Annotated[str | None, typer.Option(help="Training-free method.  [default: the model's]")] = None,
    method_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A setting of the method. May be repeated.")
    ] = None,
    arm: Annotated[bool, typer.Option("--arm/--no-arm", help="Export ARM, where the model has one.")] = True,
    templates: Annotated[
        str | None, typer.Option(help="Template set that the example runner uses.  [default: the model's]")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Write graphs with 8-bit weights too (onnx only).")] = False,
    measure_on: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="With --int8: compare mIoU with 32 bits on labelled data (int8.json)."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of that data set.")] = "val",
    limit: Annotated[int | None, typer.Option(help="Take only so many photos of it, evenly spread.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let code that comes with the model run.")
    ] = False,
) -> None:
    """Export a model: image tower with ARM, and text tower, with free batch, height, width and number of classes.

    The graphs are compared with torch on inputs of several sizes, and nothing is kept that differs. run.py, beside the
    ONNX graphs, segments a photo without torch.
    """
    with one_line_errors():
        from arm_hf.folders import new_folder

        if format not in ("onnx", "torch"):
            raise ValueError(f"unknown format {format!r}; choose onnx or torch")
        if int8 and format != "onnx":
            raise ValueError("--int8 goes with --format onnx")
        if measure_on is not None and not int8:
            raise ValueError("--measure-on compares 8 with 32 bits; add --int8")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        with new_folder(out) as folder:
            from arm_hf.exporting import ImageGraph, export_onnx, export_torch, quantise, require_onnx
            from arm_hf.modeling.prompts import resolve_templates
            from arm_hf.segmenting import load_pipeline, parse_options

            if format == "onnx":
                require_onnx()
            data = None
            if measure_on is not None:
                from arm_hf.data import open_data

                data = open_data(measure_on, split)
                if limit is not None and limit < len(data):
                    data = data.select([index * len(data) // limit for index in range(limit)])
            quiet_libraries()
            pipe = load_pipeline(model, revision, "cpu", "float32", trust_remote_code)
            graph = ImageGraph(pipe.model, method, parse_options(method_option or []), arm)
            sentences = resolve_templates(templates or getattr(pipe.model.config, "templates", None) or "imagenet80")
            typer.echo(f"{graph.method}{' + ARM' if graph.use_arm else ''} of {model}, {format}")
            if format == "onnx":
                written = export_onnx(pipe, folder, graph, sentences)
            else:
                written = export_torch(folder, graph, pipe.text_encoder.clip)
            if int8:
                written += quantise(folder)
            for each in written:
                checked = "" if each.difference is None else f"  differs from torch by at most {each.difference:.1e}"
                typer.echo(f"{each.path.name:<16} {each.num_bytes / 1e6:8.1f} MB{checked}")
            if data is not None:
                from arm_hf.export_quality import compare_weights, save_quality

                qualities = compare_weights(folder, data, progress=True)
                save_quality(folder, data, qualities)
                for name, quality in qualities.items():
                    typer.echo(
                        f"{name:<8} mIoU {quality.mean_iou:5.2f} on {len(data)} photos, {quality.seconds:.2f} s each, "
                        f"{100 * quality.agreement:.2f}% of the pixels as in float32"
                    )
        typer.echo(f"written to {out}")
