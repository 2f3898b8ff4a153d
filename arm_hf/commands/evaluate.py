"""`arm-hf evaluate`: mIoU of many methods by the literature's protocols; `arm-hf protocols`: what these say."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from arm_hf import DEFAULT_MODEL

from .common import one_line_errors, printable, quiet_libraries


def evaluate(
    data: Annotated[
        str,
        typer.Option(
            metavar="DIR|HUB_ID",
            help="A folder with images/, labels/, classes.json; a standard tree; or a hub data set.",
        ),
    ],
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Folder of the results; an unfinished evaluation in it goes on.")
    ],
    split: Annotated[str, typer.Option(help="Which list of images.")] = "val",
    protocol: Annotated[
        str, typer.Option(help='See `arm-hf protocols`; "plain" takes the data set\'s own classes.')
    ] = "plain",
    methods: Annotated[str, typer.Option(help='"all", or methods separated by commas.')] = "clearclip",
    arm: Annotated[
        str | None,
        typer.Option(
            metavar="off|on|both|MODEL",
            help="Methods alone, with ARM, or both; or an ARM checkpoint for both.  [default: both, if there is ARM]",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"A model's name, folder or hub id.  [default: {DEFAULT_MODEL}]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    limit: Annotated[int | None, typer.Option(help="Take only the first so many images.")] = None,
    layout: Annotated[str | None, typer.Option(help="Layout of a standard tree, if it is not recognised.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the images in a hub data set.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels in a hub data set.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Do not download a hub data set first.")] = False,
    labels_from: Annotated[
        str | None,
        typer.Option(
            metavar="SET|FILE",
            help="The classes in the order of their labels: their words for protocol plain; for a hub data set, which "
            "they are.",
        ),
    ] = None,
    trust_order: Annotated[
        bool, typer.Option("--trust-order", help="The classes are in the protocol's order, whatever their names.")
    ] = False,
    common_input: Annotated[
        bool,
        typer.Option(
            "--common-input",
            help="Show all methods the same image and position table, in one pass, not each its paper's.",
        ),
    ] = False,
    size: Annotated[int | None, typer.Option(help="Shorter side in place of the protocol's.")] = None,
    window: Annotated[int | None, typer.Option(help="Window in place of the protocol's; 0: the whole image.")] = None,
    stride: Annotated[int | None, typer.Option(help="Step of that window.  [default: half of it]")] = None,
    resize: Annotated[
        str | None, typer.Option(metavar="pil-bicubic|opencv-bilinear|processor", help="In place of the protocol's.")
    ] = None,
    method_option: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD.KEY=VALUE", help="A setting in place of the protocol's. May be repeated."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Background threshold in place of the protocol's; 0: none.")
    ] = None,
    pamr: Annotated[bool, typer.Option("--pamr", help="Run PAMR where the authors' own numbers contain it.")] = False,
    boundary: Annotated[
        float, typer.Option(help="Width of boundaries as a share of the diagonal; 0: leave out.")
    ] = 0.02,
    metric: Annotated[
        str, typer.Option(metavar="ours|hub|PATH", help="hub: also mIoU by evaluate.load, from label maps on disk.")
    ] = "ours",
    pictures: Annotated[int, typer.Option(help="Number of worst and of best images that are drawn.")] = 3,
    save_every: Annotated[int, typer.Option(help="Images after which the state is saved.")] = 20,
    window_batch_size: Annotated[int, typer.Option(help="Windows per pass; bounds memory.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto: as the model was saved.")
    ] = "float32",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let code that comes with the model run.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results, or discard an unfinished evaluation of other things.")
    ] = False,
) -> None:
    """Evaluate methods, with and without ARM: results.json, results.md, images.csv and pictures.

    A killed evaluation goes on where it was when the same command runs again. Several processes: put
    `torchrun --nproc-per-node N -m arm_hf.cli` or `accelerate launch -m arm_hf.cli` in the place of `arm-hf`.
    """
    with one_line_errors():
        from arm_hf.comparing import ARM_CHOICES, parse_methods

        if arm is not None and arm not in ARM_CHOICES:
            if model not in (None, arm):
                raise ValueError(f"--arm {arm} and --model {model} are two models; name one, and --arm off, on or both")
            model, arm = arm, "both"
        names, model = parse_methods(methods), model or DEFAULT_MODEL

        from arm_hf.evaluating import Processes, evaluate_data
        from arm_hf.evaluation_plan import EvaluationOptions, make_plan, open_evaluation_data, parse_method_options
        from arm_hf.label_sets import labels_from as read_labels
        from arm_hf.protocols import PLAIN
        from arm_hf.segmenting import load_pipeline

        labels = None if labels_from is None else read_labels(labels_from)
        options = EvaluationOptions(
            protocol=protocol,
            arm=arm or "both",
            common_input=common_input,
            size=size,
            window=window,
            stride=stride,
            interpolation=resize,
            method_options=parse_method_options(method_option or []),
            threshold=threshold,
            pamr=pamr,
            labels=labels if protocol == PLAIN else None,
            trust_order=trust_order,
            limit=limit,
            boundary_radius=boundary,
            save_every=save_every,
            window_batch_size=window_batch_size,
        )
        quiet_libraries()
        processes = Processes(device)
        from arm_hf.evaluation_pictures import write_pictures
        from arm_hf.hub_metric import OURS, HubMetric
        from arm_hf.partial_results import remove_partial
        from arm_hf.result_tables import build_results, clear_results, summary, write_results

        processes.from_main(lambda: clear_results(out, overwrite))
        source = open_evaluation_data(
            data,
            split,
            protocol,
            layout=layout,
            image_column=image_column,
            label_column=label_column,
            streaming=streaming,
            label_names=None if labels is None or os.path.exists(data) else [label.name for label in labels],
        )
        pipe = load_pipeline(model, revision, processes.device, dtype, trust_remote_code)
        if arm is None and not hasattr(pipe.model, "arm"):
            import dataclasses

            options = dataclasses.replace(options, arm="off")
        plan = make_plan(pipe, source, names, options, skip_unable=methods.strip().lower() == "all")
        hub = None if metric == OURS else HubMetric(metric, out, len(plan.protocol.classes))
        if hub is not None:
            processes.from_main(lambda: bool(hub.load()))
        if processes.is_main:
            for line in plan.describe(pipe):
                typer.echo(printable(line))
        evaluation = evaluate_data(
            pipe,
            source,
            plan,
            options,
            out,
            model,
            processes,
            overwrite,
            _progress if processes.is_main else None,
            None if hub is None else hub.keep,
        )
        if processes.is_main:
            figures = None if hub is None else hub.compute(evaluation, source)
            results = build_results(evaluation, str(pipe.device), metric, figures)
            drawn = write_pictures(pipe, source, evaluation, out, pictures, window_batch_size) if pictures > 0 else []
            paths = write_results(out, results, evaluation)
            remove_partial(out)
            for line in summary(results):
                typer.echo(printable(line))
            typer.echo(f"results: {', '.join(map(str, paths))}" + (f", {len(drawn)} pictures" if drawn else ""))
        processes.end()


def protocols(
    name: Annotated[str | None, typer.Argument(metavar="[PROTOCOL]", help="Print everything about this one.")] = None,
    backbone: Annotated[str, typer.Option(help="B/16 or L/14: whose settings, where they differ.")] = "B/16",
) -> None:
    """List the literature's evaluation protocols, or print one whole as JSON, with the source of every value."""
    with one_line_errors():
        from arm_hf.modeling.dense_clip import BUILT_IN_METHODS
        from arm_hf.protocols import list_protocols, load_protocol

        if name is None:
            for known in list_protocols():
                typer.echo(f"{known:<16} {load_protocol(known).title}")
            return
        protocol = load_protocol(name)
        record = protocol.record([protocol.setup(method, backbone) for method in BUILT_IN_METHODS])
        record["published"] = [dict(entry) for entry in protocol.published]
        typer.echo(json.dumps(record, indent=1, ensure_ascii=False))


def _progress(images, total, before):
    from tqdm import tqdm

    if before:
        typer.echo(f"going on: {before} images were evaluated before")
    return tqdm(images, total=total, unit="image", disable=None)
