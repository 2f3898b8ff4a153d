"""`arm-hf methods` and `arm-hf labels`: what there is to choose from."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .common import one_line_errors


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """List the training-free methods with paper, settings and cost."""
    with one_line_errors():
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
            for name, options in record["variants"].items():
                typer.echo(f"    variant  {name}: --method {record['name']} {options}")
            for number, setting in enumerate(record["settings"]):
                head = "settings" if number == 0 else ""
                typer.echo(f"    {head:<8} {setting['name']}={json.dumps(setting['default'])}  {setting['help']}")
            typer.echo("")


def labels(
    name: Annotated[str | None, typer.Argument(metavar="[SET]", help="Print the labels of this set.")] = None,
) -> None:
    """List the label sets of the literature, or the labels of one set (in a form that --labels-from reads)."""
    with one_line_errors():
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
