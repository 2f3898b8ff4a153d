"""What all commands share: exit codes, errors in one line, quiet libraries."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Any, TextIO

import typer


class ExitCode(IntEnum):
    """What the shell learns."""

    OK = 0
    INCOMPLETE = 1
    USAGE = 2
    INTERRUPTED = 130
    TERMINATED = 143


def quiet_libraries() -> None:
    """Keep the libraries' chatter off the terminal; downloads still show their progress, warnings are one line each."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.showwarning = _show_warning


class Interrupts:
    """Ctrl-C, and the signal that asks a process to end, as a KeyboardInterrupt that cannot get lost.

    Python drops a KeyboardInterrupt that happens to be raised inside a finaliser or a callback of a library. Long loops
    call `check`, which raises it again.

    Attributes:
        seen: Number of the first signal, or None.
    """

    def __init__(self) -> None:
        self.seen: int | None = None

    @property
    def exit_code(self) -> ExitCode:
        """What the shell learns."""
        return ExitCode.TERMINATED if self.seen == signal.SIGTERM else ExitCode.INTERRUPTED

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take the signals over, unless somebody else already has or this is not the main thread."""
        self.seen = None
        unused: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        taken = [number for number, handler in unused.items() if signal.getsignal(number) is handler]
        if threading.current_thread() is not threading.main_thread():
            taken = []
        for number in taken:
            signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number in taken:
                signal.signal(number, unused[number])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.seen is None:
            self.seen = number
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was one."""
        if self.seen is not None:
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
    except Exception as error:
        # What safetensors and tokenizers raise for a full disk is of no built-in kind.
        if traceback or not (type(error) is Exception or type(error).__module__.startswith("safetensors")):
            raise
        fail(str(error))
        raise typer.Exit(ExitCode.INCOMPLETE) from error


def _is_out_of_memory(error: BaseException) -> bool:
    # torch says so by class on accelerators and only in words on the CPU.
    return isinstance(error, MemoryError) or "memory" in str(error).lower()


def fail(message: str) -> None:
    """Print one line on the error stream."""
    typer.echo(f"arm-hf: error: {printable(' '.join(message.split()))}", err=True)


# Control characters, line separators, marks that turn the writing direction, bytes that are no text.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text with what could move a terminal's cursor, colour it or fake a line spelt out, such as `\\x1b`.

    Names of files, classes and labels come from anywhere.

    Args:
        text: What is to be shown; line ends are spelt out too.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def drop_output(stream: TextIO) -> None:
    """Keep the interpreter from flushing into an output that takes nothing any more.

    Args:
        stream: The output; what follows goes nowhere.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"arm-hf: warning: {printable(' '.join(str(message).split()))}", file=file or sys.stderr)
