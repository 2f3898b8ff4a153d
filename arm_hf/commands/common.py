"""What all commands share: exit codes, errors in one line, quiet libraries."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType

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


class Interrupts:
    """Ctrl-C that cannot get lost.

    Python drops a KeyboardInterrupt that happens to be raised inside a finaliser or a callback of a library. Long loops
    call `check`, which raises it again.
    """

    def __init__(self) -> None:
        self.seen = False

    def watch(self) -> None:
        """Take the signal over, unless somebody else already has or this is not the main thread."""
        own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if own and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was one."""
        if self.seen:
            raise KeyboardInterrupt


interrupts = Interrupts()


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
