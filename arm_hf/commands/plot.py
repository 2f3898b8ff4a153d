"""`arm-hf plot`: pictures of results, trainings and scores."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from arm_hf import DEFAULT_MODEL

from .common import one_line_errors, quiet_libraries

plot = typer.Typer(
    name="plot",
    help="Plot results, trainings and scores.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[str, typer.Option(metavar="FILE", help="The picture: .png, .svg or .pdf.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the picture if it is there.")]


@plot.command()
def results(
    files: Annotated[
        list[str],
        typer.Argument(metavar="RESULTS", help="results.json or folder of `arm-hf evaluate`, or hub_cards/results."),
    ],
    out: Out = "results.png",
    papers: Annotated[
        bool, typer.Option("--papers", help="Mark the papers' numbers, which are for their CLIP and whole data sets.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Show mIoU as bars: methods, with and without ARM, a panel for each data set."""
    with one_line_errors():
        _check(out, overwrite)
        from arm_hf.plot_data import read_results
        from arm_hf.plots import result_bars

        _save(result_bars([row for file in files for row in read_results(file)], papers), out)


@plot.command()
def classes(
    files: Annotated[list[str], typer.Argument(metavar="RESULTS", help="As for results; all of one data set.")],
    out: Out = "classes.png",
    data: Annotated[str | None, typer.Option(help="The data set, if a file holds several.")] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option("--row", help="Show only this row, such as clearclip or 'clearclip + ARM'. May be repeated."),
    ] = None,
    most: Annotated[int, typer.Option(help="Most classes: the best and the worst of the first row.")] = 60,
    overwrite: Overwrite = False,
) -> None:
    """Show the IoU of every class."""
    with one_line_errors():
        _check(out, overwrite)
        from arm_hf.plot_data import read_results
        from arm_hf.plots import class_bars

        found = [row for file in files for row in read_results(file)]
        for what, wanted, of in (("data set", [data] if data else [], "data"), ("row", rows or [], "name")):
            known = dict.fromkeys(getattr(row, of) for row in found)
            if missing := [name for name in wanted if name not in known]:
                raise ValueError(f"there is no {what} {missing[0]!r}; there are {', '.join(known)}")
            found = [row for row in found if not wanted or getattr(row, of) in wanted]
        _save(class_bars(found, most), out)


@plot.command()
def confusion(
    file: Annotated[str, typer.Argument(metavar="DIR|FILE", help="Folder of `arm-hf evaluate`, or its confusion.npz.")],
    out: Out = "confusion.png",
    row: Annotated[str | None, typer.Option(help="Which row of the results, if there are several.")] = None,
    most: Annotated[int, typer.Option(help="Most classes: those with the most pixels.")] = 40,
    overwrite: Overwrite = False,
) -> None:
    """Show what the pixels of each class were taken for."""
    with one_line_errors():
        _check(out, overwrite)
        from arm_hf.plot_data import read_confusion
        from arm_hf.plots import confusion_plot

        name, counts, names = read_confusion(file, row)
        _save(confusion_plot(counts, names, name, most), out)


@plot.command()
def curves(
    runs: Annotated[list[str], typer.Argument(metavar="RUNS", help="Folders of training runs, or their log.jsonl.")],
    out: Out = "curves.png",
    keys: Annotated[
        list[str] | None,
        typer.Option("--key", help="loss, lr, grad_norm, images_per_second, ... May be repeated.  [default: loss, lr]"),
    ] = None,
    smooth: Annotated[int, typer.Option(help="Values in the running mean of the loss; 1: none.")] = 20,
    overwrite: Overwrite = False,
) -> None:
    """Show loss, learning rate and validation mIoU of trainings."""
    with one_line_errors():
        _check(out, overwrite)
        from arm_hf.plot_data import read_log
        from arm_hf.plots import training_curves

        _save(training_curves([read_log(run) for run in runs], keys or ("loss", "lr"), smooth), out)


@plot.command()
def scores(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image file or http(s) address.")],
    labels: Annotated[str, typer.Option(help='What to look for: "cat, dog=puppy|hound, sky".')],
    out: Annotated[str, typer.Option(metavar="FILE", help="The picture (PNG).")] = "scores.png",
    model: Annotated[str, typer.Option(help="The embedded model, a local folder, or a hub id.")] = DEFAULT_MODEL,
    method: Annotated[str | None, typer.Option(help="Training-free method.  [default: the model's]")] = None,
    arm: Annotated[bool | None, typer.Option("--arm/--no-arm", help="Refine with ARM.  [default: if there]")] = None,
    background: Annotated[str | None, typer.Option(help="Background policy, as for segment.")] = None,
    size: Annotated[int | None, typer.Option(help="Shorter side in pixels that the network sees.")] = None,
    most: Annotated[int, typer.Option(help="Most classes: those with the largest mean score.")] = 24,
    stretch: Annotated[
        bool, typer.Option("--stretch", help="Let the colours end at the highest score of the picture, not at 1.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Show the score of every label all over a photo."""
    with one_line_errors():
        _check(out, overwrite, kinds=(".png",))
        from arm_hf.folders import atomic_path, read_image
        from arm_hf.modeling.prompts import parse_labels
        from arm_hf.segmenting import RunSettings, load_pipeline
        from arm_hf.sheets import score_sheet

        settings = RunSettings(parse_labels(labels), background, method, use_arm=arm, size=size)
        photo = read_image(image)
        quiet_libraries()
        pipe = load_pipeline(model, device=device)
        found = pipe(photo, semantic=True, class_scores=True, **settings.call_arguments())
        limits = (0.0, max(1e-6, float(found["class_scores"].max()))) if stretch else (0.0, 1.0)
        with atomic_path(out) as path:
            score_sheet(photo, found["class_scores"], found["id2label"], most, limits=limits).save(path, format="PNG")
        typer.echo(f"picture: {out}")


def _check(out: str, overwrite: bool, kinds: tuple[str, ...] = (".png", ".svg", ".pdf")) -> None:
    if not out.lower().endswith(kinds):
        raise ValueError(f"the picture is written as {', '.join(kinds)}, not as {os.path.basename(out)!r}")
    if os.path.exists(out) and not overwrite:
        raise ValueError(f"{out} is there already; choose another --out, or pass --overwrite")


def _save(figure: Any, out: str) -> None:
    from arm_hf.plots import save_figure

    save_figure(figure, out)
    typer.echo(f"picture: {out}")
