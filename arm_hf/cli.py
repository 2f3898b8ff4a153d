"""The command `arm-hf`: reads the command line, calls the modules that do the work, prints what they found.

Exit codes: 0 all went well; 1 some pictures were skipped, or the work broke off; 2 the command line, or an input it
names, is wrong; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Annotated, Any

import typer

from arm_hf import DEFAULT_MODEL, __version__

# With more pictures than this a progress bar takes the place of the tables.
_FEW_PICTURES = 5


class ExitCode(IntEnum):
    """What the shell learns."""

    OK = 0
    INCOMPLETE = 1
    USAGE = 2
    INTERRUPTED = 130


app = typer.Typer(
    name="arm-hf",
    help="Segment photos with words of your own choice: a frozen CLIP, training-free methods, and ARM.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"arm-hf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Segment photos with words of your own choice: a frozen CLIP, training-free methods, and ARM."""


@app.command()
def segment(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES", help="Image files, folders of them, or http(s) addresses.")
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
    batch_size: Annotated[int, typer.Option(help="Pictures per forward pass.")] = 1,
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

    Pictures that cannot be read are skipped and listed at the end; the exit code is then 1.
    """
    with _one_line_errors(traceback):
        from arm_hf.folders import collect_images, plan_outputs
        from arm_hf.label_sets import labels_from as read_labels
        from arm_hf.modeling.prompts import parse_labels

        if labels is None and labels_from is None:
            raise ValueError('say what to look for: --labels "cat, dog, sky" or --labels-from voc21')
        wanted = [] if labels_from is None else list(read_labels(labels_from))
        wanted += [] if labels is None else parse_labels(labels)
        parsed = parse_labels(wanted)
        files = collect_images(images, out)
        plan = plan_outputs(files, out, overwrite)

        from arm_hf.segmenting import RunSettings, load_pipeline, parse_options, segment_files

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
        _quiet_libraries()
        pipe = load_pipeline(model, revision, device, dtype, trust_remote_code)
        results = segment_files(pipe, files, plan, settings, model)
        skipped = _report(results, len(files), out)
    if skipped:
        raise typer.Exit(ExitCode.INCOMPLETE)


@app.command()
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
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Run several methods on one photo with one shared pass: a grid picture and the time of each."""
    with _one_line_errors():
        from arm_hf.comparing import compare as run
        from arm_hf.comparing import grid, parse_methods
        from arm_hf.folders import atomic_path, read_image
        from arm_hf.modeling.prompts import parse_labels
        from arm_hf.segmenting import load_pipeline

        names, parsed = parse_methods(methods), parse_labels(labels)
        if os.path.exists(out) and not overwrite:
            raise ValueError(f"{out} is there already; choose another --out, or pass --overwrite")
        picture = read_image(image)
        _quiet_libraries()
        pipe = load_pipeline(model, device=device)
        found = run(pipe, picture, parsed, names, arm=arm, background=background, size=size)
        with atomic_path(out) as path:
            grid(picture, found).save(path, format="PNG")
        typer.echo(f"shared trunk  {found.trunk_seconds * 1000:7.0f} ms")
        for result in found.results:
            typer.echo(f"{result.name:<24} {result.seconds * 1000:7.0f} ms more")
        for name, reason in found.left_out.items():
            typer.echo(f"arm-hf: left out {name}: {reason}", err=True)
        typer.echo(f"picture: {out}")


@app.command()
def coherence(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A folder with images/, labels/, classes.json and lists of names.")
    ],
    split: Annotated[str, typer.Option(help="Which list of names: val for val.txt.")] = "val",
    limit: Annotated[int | None, typer.Option(help="Take only the first so many images.")] = None,
    model: Annotated[str, typer.Option(help="The embedded model, a local folder, or a hub id.")] = DEFAULT_MODEL,
    size: Annotated[int | None, typer.Option(help="Shorter side in pixels that the network sees.")] = None,
    templates: Annotated[str | None, typer.Option(help="Sentences for the class names, as for segment.")] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Write the numbers to this JSON file, too.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Measure how coherent the patches of each layer are on labelled images, and so find the layer of `cra_dsi`."""
    with _one_line_errors():
        if out is not None and os.path.exists(out) and not overwrite:
            raise ValueError(f"{out} is there already; choose another --out, or pass --overwrite")
        from arm_hf.labelled_folders import open_labelled_folder

        folder = open_labelled_folder(data, split, limit)

        from tqdm import tqdm

        from arm_hf.coherence import measure_coherence
        from arm_hf.folders import atomic_path
        from arm_hf.segmenting import load_pipeline

        _quiet_libraries()
        pipe = load_pipeline(model, device=device)
        report = measure_coherence(
            pipe, folder, size, templates, progress=lambda pairs: tqdm(pairs, unit="image", disable=None)
        )
        for line in report.table():
            typer.echo(line)
        if out is not None:
            record = {"model": model, "data": data, "split": split, "size": size, **report.record()}
            with atomic_path(out) as path:
                path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            typer.echo(f"numbers: {out}")


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """List the training-free methods with paper, settings and cost."""
    with _one_line_errors():
        from arm_hf.method_table import describe_methods

        records = describe_methods()
        if as_json:
            typer.echo(json.dumps(records, indent=2, ensure_ascii=False))
            return
        for record in records:
            typer.echo(f"{record['name']}: {record['summary']}")
            typer.echo(f"    paper    {record['paper']}")
            typer.echo(f"    follows  {record['reference']}")
            typer.echo(f"    cost     {record['cost']}")
            for number, setting in enumerate(record["settings"]):
                head = "settings" if number == 0 else ""
                typer.echo(f"    {head:<8} {setting['name']}={json.dumps(setting['default'])}  {setting['help']}")
            typer.echo("")


@app.command()
def labels(
    name: Annotated[str | None, typer.Argument(metavar="[SET]", help="Print the labels of this set.")] = None,
) -> None:
    """List the label sets of the literature, or the labels of one set (in a form that --labels-from reads)."""
    with _one_line_errors():
        from arm_hf.label_sets import describe_label_set, list_label_sets, load_label_set
        from arm_hf.modeling.prompts import format_labels

        if name is None:
            for known in list_label_sets():
                record = describe_label_set(known)
                typer.echo(f"{known:<22} {len(record['labels']):>4} labels  {record['title']}")
            return
        record = describe_label_set(name)
        typer.echo(f"# {record['title']}")
        typer.echo(f"# {record['dataset']}; words of {record['words_from']}")
        for label in load_label_set(name):
            typer.echo(format_labels([label]))


def _report(results: Iterator[Any], total: int, out: str) -> int:
    """Print what becomes of the pictures; return how many were skipped."""
    from tqdm import tqdm

    from arm_hf.segmenting import Skipped

    written, skipped = 0, []
    with tqdm(results, total=total, unit="image", disable=total <= _FEW_PICTURES or None) as bar:
        for result in bar:
            if isinstance(result, Skipped):
                skipped.append(result)
                continue
            written += 1
            if total <= _FEW_PICTURES:
                typer.echo(f"{result.file.name}  {result.size[0]} x {result.size[1]}  ->  {result.outputs.overlay}")
                longest = max(len(segment.label) for segment in result.segments)
                for segment, score in zip(result.segments, result.scores, strict=True):
                    typer.echo(f"  {segment.label:<{longest}}  {100 * segment.share:5.1f}%  score {score:.2f}")
    typer.echo(f"{written} of {total} {'picture' if total == 1 else 'pictures'} segmented, results in {out}")
    for result in skipped:
        typer.echo(f"arm-hf: skipped: {result.reason}", err=True)
    return len(skipped)


def _quiet_libraries() -> None:
    """Keep the libraries' chatter off the terminal; downloads still show their progress."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def _one_line_errors(traceback: bool = False) -> Iterator[None]:
    """Turn an error that the user can mend into one line and an exit code."""
    try:
        yield
    except BrokenPipeError:  # `arm-hf labels | head`: main() sees to it
        raise
    except (ValueError, OSError, ImportError) as error:
        if traceback:
            raise
        _fail(str(error) or type(error).__name__)
        raise typer.Exit(ExitCode.USAGE if isinstance(error, ValueError) else ExitCode.INCOMPLETE) from error
    except (RuntimeError, MemoryError) as error:
        if traceback or not _is_out_of_memory(error):
            raise
        _fail("out of memory; try a smaller --size, a --window, --batch-size 1, or --dtype bfloat16")
        raise typer.Exit(ExitCode.INCOMPLETE) from error


def _is_out_of_memory(error: BaseException) -> bool:
    # torch says so by class on accelerators and only in words on the CPU.
    return isinstance(error, MemoryError) or "memory" in str(error).lower()


def _fail(message: str) -> None:
    typer.echo(f"arm-hf: error: {' '.join(message.split())}", err=True)


def main() -> None:
    """Run the command line; the console script `arm-hf` and `python -m arm_hf.cli` call this."""
    try:
        code = app(standalone_mode=False, prog_name="arm-hf")
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = ExitCode.INTERRUPTED
    except BrokenPipeError:
        # Nobody reads on: end quietly, and keep the interpreter from flushing into the closed pipe once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ExitCode.INCOMPLETE
    except typer.TyperException as error:
        _fail(f"{error.format_message()} (see arm-hf --help)")
        code = error.exit_code
    if code == ExitCode.INTERRUPTED:
        typer.echo("\narm-hf: interrupted; finished pictures are complete, nothing half-written is left", err=True)
    raise SystemExit(int(code or 0))


if __name__ == "__main__":
    main()
