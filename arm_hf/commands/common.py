"""What all commands share: exit codes, errors in one line, quiet libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import typer


class ExitCode(IntEnum):
    """What the shell learns."""

    OK = 0
    INCOMPLETE = 1
    USAGE = 2
    INTERRUPTED = 130


def quiet_libraries() -> None:
    """Keep the libraries' chatter off the terminal; downloads still show their progress."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def one_line_errors(traceback: bool = False) -> Iterator[None]:
    """Turn an error that the user can mend into one line and an exit code.

    Args:
        traceback: Let the error through, for a bug report.
    """
    try:
        yield
    except BrokenPipeError:  # `arm-hf labels | head`: main() sees to it
        raise
    except (ValueError, OSError, ImportError) as error:
        if traceback:
            raise
        fail(str(error) or type(error).__name__)
        raise typer.Exit(ExitCode.USAGE if isinstance(error, ValueError) else ExitCode.INCOMPLETE) from error
    except (RuntimeError, MemoryError) as error:
        if traceback or not _is_out_of_memory(error):
            raise
        fail("out of memory; try a smaller --size, a --window, --batch-size 1, or --dtype bfloat16")
        raise typer.Exit(ExitCode.INCOMPLETE) from error


def _is_out_of_memory(error: BaseException) -> bool:
    # torch says so by class on accelerators and only in words on the CPU.
    return isinstance(error, MemoryError) or "memory" in str(error).lower()


def fail(message: str) -> None:
    """Print one line on the error stream."""
    typer.echo(f"arm-hf: error: {' '.join(message.split())}", err=True)
