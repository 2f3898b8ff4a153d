"""The command `arm-hf`: puts the commands together and runs the one that was asked for.

Exit codes: 0 all went well; 1 some pictures were skipped, or the work broke off; 2 the command line, or an input it
names, is wrong; 130 interrupted (Ctrl-C); 143 told to end (SIGTERM).
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from arm_hf import __version__
from arm_hf.commands.app import app as app_command
from arm_hf.commands.benchmark import benchmark
from arm_hf.commands.card import card
from arm_hf.commands.coherence import coherence
from arm_hf.commands.common import ExitCode, drop_output, fail, interrupts
from arm_hf.commands.compare import compare
from arm_hf.commands.data import data
from arm_hf.commands.evaluate import evaluate, protocols
from arm_hf.commands.export import export
from arm_hf.commands.listings import labels, methods
from arm_hf.commands.plot import plot
from arm_hf.commands.publish import publish
from arm_hf.commands.segment import segment

COMMANDS = (
    segment,
    compare,
    app_command,
    evaluate,
    protocols,
    data,
    coherence,
    export,
    benchmark,
    methods,
    labels,
    publish,
    card,
)

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


for _command in COMMANDS:
    app.command()(_command)
app.add_typer(plot)


def main() -> None:
    """Run the command line; the console script `arm-hf` and `python -m arm_hf.cli` call this."""
    with interrupts.watching():
        code = _run()
    raise SystemExit(int(code or 0))


def _run() -> int | None:
    code: int | None = None
    try:
        code = app(standalone_mode=False, prog_name="arm-hf")
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = interrupts.exit_code
    except BrokenPipeError:  # nobody reads on: end quietly
        drop_output(sys.stdout)
        code = ExitCode.INCOMPLETE
    except OSError as error:  # of the flush; commands see to their own
        drop_output(sys.stdout)
        if not code:
            fail(f"cannot write to the standard output: {error.strerror or error}")
        code = ExitCode.INCOMPLETE
    except typer.TyperException as error:
        fail(f"{error.format_message()} (see arm-hf --help)")
        code = error.exit_code
    if code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED):
        code = interrupts.exit_code  # typer itself takes every interrupt for Ctrl-C
        typer.echo("\narm-hf: interrupted; finished pictures are complete, nothing half-written is left", err=True)
    return code


if __name__ == "__main__":
    main()
