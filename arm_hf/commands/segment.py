"""`arm-hf segment`: label maps, legends and overlays of pictures."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import closing
from typing import Annotated, Any

import typer

from arm_hf import DEFAULT_MODEL

from .common import ExitCode, interrupts, one_line_errors, printable, quiet_libraries

# With more pictures than this a progress bar takes the place of the tables.
_FEW_PICTURES = 5
_LONGEST_LABEL = 60  # in the tables, in characters
_SECONDS_BETWEEN_LINES = 30.0  # of progress, where the error stream is no terminal


def segment(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES",
            help="Image files, folders of them, or http(s) addresses; or parquet files (also a folder of them, or a "
            "pattern in quotes); or a data set of the Hub, owner/name.",
        ),
    ],
    labels: Annotated[
        str | None,
        typer.Option(
            help='What to look for: "cat, dog=puppy|hound, sky". Synonyms after = or |; the best word of a label '
            "counts.",
        ),
    ] = None,
    labels_from: Annotated[
        str | None,
        typer.Option(
            metavar="SET|FILE",
            help="A label set of the literature (see `arm-hf labels`) or a text file with one label on each line. "
            "Labels of both options are joined.",
        ),
    ] = None,
    out: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="Folder of the results: NAME.png (label map), NAME.json (legend, shares, scores), NAME_overlay.png.",
        ),
    ] = "segmented",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are there already.")] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on where the same command was cut off: finished pictures stay, unfinished ones are made again. "
            "An error if the settings differ.",
        ),
    ] = False,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="N/COUNT",
            help="Do the N-th of COUNT equal parts, each in a process of its own, on any machine that sees the "
            "folder of the results.  [default: what torchrun or accelerate launch says]",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a data set of the Hub.")] = "train",
    image_column: Annotated[
        str | None, typer.Option(help="Column of a data set that holds the pictures.  [default: the only one]")
    ] = None,
    pictures: Annotated[bool, typer.Option("--overlay/--no-overlay", help="Write the picture for people too.")] = True,
    colors: Annotated[
        str, typer.Option(metavar="vivid|colorblind", help="Palette; colorblind suits every kind of eye.")
    ] = "vivid",
    contours: Annotated[
        bool, typer.Option("--contours", help="Outline the patches and leave the photo's colours as they are.")
    ] = False,
    model: Annotated[
        str,
        typer.Option(help="The embedded model, a local folder, or a hub id; an ARM checkpoint or a plain CLIP."),
    ] = DEFAULT_MODEL,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    method: Annotated[
        str | None, typer.Option(help="Training-free method (see `arm-hf methods`).  [default: the model's]")
    ] = None,
    method_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A setting of the method, such as gaussian_std=5. May be repeated."),
    ] = None,
    arm: Annotated[
        bool | None,
        typer.Option("--arm/--no-arm", help="Refine the method's map with ARM.  [default: if the model has one]"),
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(
            help='What is none of the labels: "none", a probability below which a pixel is background ("0.3"), words '
            '("sky|wall"), or both ("0.3|sky|wall").  [default: the model\'s]'
        ),
    ] = None,
    templates: Annotated[
        list[str] | None,
        typer.Option(
            help='Sentences the words are put into: imagenet80, cliper15, single, or your own, such as "a photo of a '
            "{}.\" (then it may be repeated).  [default: the model's]"
        ),
    ] = None,
    logit_scale: Annotated[
        float | None, typer.Option(help="Factor on the cosines inside the softmax.  [default: the method's]")
    ] = None,
    pamr: Annotated[
        int | None, typer.Option(help="Rounds of PAMR, which fits the map to the photo's colours; NACLIP uses 10.")
    ] = None,
    compensation: Annotated[
        str | None,
        typer.Option(
            metavar="ID|DIR", help="A Stable Diffusion checkpoint whose self-attention sharpens the map, as in CLIPer."
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Shorter side in pixels that the network sees.  [default: the model's]")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Side of a sliding window in those pixels.  [default: the whole picture]")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Step of the window.  [default: half of it]")] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures of equal shape per forward pass.")] = 1,
    workers: Annotated[
        int | None,
        typer.Option(help="Threads that read ahead, and as many that write behind.  [default: by cores and device]"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...  [default: an accelerator if there is one]")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto: as the model was saved.")
    ] = "float32",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let code that comes with the model run.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error comes from, for a bug report.")
    ] = False,
) -> None:
    """Segment pictures: a label map, a legend and an overlay for each.

    Pictures that cannot be read are skipped and listed at the end; the exit code is then 1. Many processes share the
    work under torchrun or accelerate launch (-m arm_hf.cli segment ...), or with --part.
    """
    with one_line_errors(traceback):
        from arm_hf.drawing import DrawingStyle
        from arm_hf.folders import collect_images, output_folder, plan_outputs
        from arm_hf.image_tables import ImageTable, tables_of
        from arm_hf.label_sets import labels_from as read_labels
        from arm_hf.manifest import Manifest, Part
        from arm_hf.modeling.prompts import parse_labels

        if labels is None and labels_from is None:
            raise ValueError('say what to look for: --labels "cat, dog, sky" or --labels-from voc21')
        if resume and overwrite:
            raise ValueError("--resume keeps finished results and --overwrite replaces them; choose one")
        style = DrawingStyle(colors, contours)
        wanted = [] if labels_from is None else list(read_labels(labels_from))
        wanted += [] if labels is None else parse_labels(labels)
        parsed = parse_labels(wanted)
        mine = Part.parse(part)
        if tables := tables_of(images):
            table = ImageTable(tables, split, image_column)
            total = table.total(mine)
        else:
            files = collect_images(images, out)
            plan = plan_outputs(files, out, overwrite or resume, pictures, mine.share)
            files = files[mine.share]
            total = len(files)

        from arm_hf.segmenting import (
            RunSettings,
            default_workers,
            load_pipeline,
            parse_options,
            run_record,
            segment_files,
        )

        settings = RunSettings(
            labels=parsed,
            background=background,
            method=method,
            method_options=parse_options(method_option or []),
            use_arm=arm,
            templates=templates[0] if templates and len(templates) == 1 else templates or None,
            window=window,
            stride=stride,
            size=size,
            logit_scale=logit_scale,
            pamr=pamr,
            compensation=compensation,
            batch_size=batch_size,
        )
        if workers is not None and workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
        quiet_libraries()
        pipe = load_pipeline(model, revision, device, dtype, trust_remote_code)
        record = {**run_record(pipe, settings, model), "drawing": vars(style)}
        existing = "keep" if resume else "replace" if overwrite else "refuse"
        manifest = Manifest(output_folder(out), record, mine, existing)
        jobs = manifest.left(table.jobs(manifest, pictures) if tables else zip(files, plan, strict=True))
        threads = default_workers(pipe.device.type, total) if workers is None else workers
        try:
            skipped = _report(segment_files(pipe, jobs, settings, record, threads, style), manifest, total)
        finally:
            manifest.close()
    if skipped:
        raise typer.Exit(ExitCode.INCOMPLETE)


def _report(results: Generator[Any], manifest: Any, total: int | None) -> int:
    """Record and print what becomes of the pictures; return how many were skipped."""
    from tqdm import tqdm

    from arm_hf.folders import Skipped

    written, began = 0, time.monotonic()
    skipped: list[Skipped] = []
    few = total is not None and total <= _FEW_PICTURES
    on_terminal = sys.stderr.isatty()
    bar = tqdm(
        total=total,
        unit="image",
        desc=None if manifest.part.count == 1 else f"part {manifest.part}",
        disable=few,
        mininterval=0.1 if on_terminal else _SECONDS_BETWEEN_LINES,
        delay=0 if on_terminal else _SECONDS_BETWEEN_LINES,
    )
    with closing(results), bar:
        for result in results:
            manifest.note(result)
            interrupts.check()
            # What was done before counts towards the end but not towards the speed.
            bar.initial = manifest.num_kept
            bar.update(written + len(skipped) + 1 + manifest.num_kept - bar.n)
            if isinstance(result, Skipped):
                skipped.append(result)
                continue
            written += 1
            if few:
                written_to = f"{result.size[0]} x {result.size[1]}  ->  {result.outputs.paths()[-1]}"
                typer.echo(printable(f"{result.file.name}  {written_to}"))
                names = [_shown(segment.label) for segment in result.segments]
                longest = max(map(len, names))
                for name, segment, score in zip(names, result.segments, result.scores, strict=True):
                    typer.echo(f"  {name:<{longest}}  {100 * segment.share:5.1f}%  score {score:.2f}")
    typer.echo(_summary(written, len(skipped), manifest, total, time.monotonic() - began))
    for result in skipped:
        typer.echo(f"arm-hf: skipped: {printable(result.reason)}", err=True)
    return len(skipped)


def _shown(label: str) -> str:
    """A label for the terminal: printable, and not longer than a line."""
    label = printable(label)
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…"


def _summary(written: int, skipped: int, manifest: Any, total: int | None, seconds: float) -> str:
    count = written + skipped + manifest.num_kept if total is None else total
    text = f"{written} of {count} {'picture' if count == 1 else 'pictures'} segmented"
    if manifest.num_kept:
        text += f", {manifest.num_kept} were done before"
    if manifest.part.count > 1:
        text = f"part {manifest.part}: {text}"
    if written > _FEW_PICTURES:
        text += f" in {seconds:.0f} s ({written / seconds:.2f} a second)"
    return f"{text}, results in {manifest.out}"
