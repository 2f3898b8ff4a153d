"""Small parts of the training loop: agreement between processes, being asked to stop, time."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

REPEATED_WITHIN = 2.0  # seconds


def together(accelerator: Accelerator, *numbers: int) -> list[int]:
    """Sums of whole numbers over all processes.

    Args:
        accelerator: Knows the processes.
        numbers: Of this process.
    """
    summed: Any = accelerator.reduce(torch.tensor(numbers, device=accelerator.device), "sum")
    return summed.tolist()


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on the device.

    Args:
        batch: Tensors and other values by name.
        device: Where to.
    """
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()
    }


class StopRequest:
    """Notes a signal that asks the process to stop. Launchers repeat it; a later Ctrl-C ends the process at once.

    Attributes:
        signal: Number of the signal, or None.
    """

    WATCHED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

    def __init__(self) -> None:
        self.signal: int | None = None
        self._noted = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.WATCHED}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _frame: Any) -> None:
        if self.signal is None:
            self.signal, self._noted = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() > self._noted + REPEATED_WITHIN:
            raise KeyboardInterrupt


def let_parent_decide(_worker: int) -> None:
    """In a process that reads images: leave the signals that ask for a stop to the training process."""
    for number in StopRequest.WATCHED:
        signal.signal(number, signal.SIG_IGN)


class Clock:
    """Images per second and time left, without the pauses for validation and checkpoints."""

    def __init__(self) -> None:
        self._started = self._since = time.perf_counter()
        self._paused = 0.0
        self._images, self._steps = 0, 0
        self._at_pause = 0.0

    def count(self, images: int) -> None:
        """A step with that many images is done."""
        self._images += images
        self._steps += 1

    def pause(self) -> None:
        """What follows is no training."""
        self._at_pause = time.perf_counter()

    def go_on(self) -> None:
        """Training goes on."""
        self._paused += time.perf_counter() - self._at_pause
        self._since += time.perf_counter() - self._at_pause

    def rate(self) -> float:
        """Images per second since the last call."""
        now = time.perf_counter()
        images, seconds = self._images, now - self._since
        self._images, self._since = 0, now
        return images / max(seconds, 1e-9)

    def left(self, steps: int) -> float:
        """Seconds that so many steps will take, at the pace so far."""
        return steps * (time.perf_counter() - self._started - self._paused) / max(self._steps, 1)


def random_state(accelerator: Accelerator) -> dict[str, Tensor]:
    """State of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if accelerator.device.type != "cpu":
        state["device"] = torch.get_device_module(accelerator.device).get_rng_state()
    return state


def set_random_state(states: Sequence[Mapping[str, Tensor]], accelerator: Accelerator) -> None:
    """Put the generators where they were; with another number of processes they start anew.

    Args:
        states: One for each process, from `random_state`.
        accelerator: Says which process this is.
    """
    if len(states) != accelerator.num_processes:
        return
    state = states[accelerator.process_index]
    torch.set_rng_state(state["cpu"])
    if "device" in state and accelerator.device.type != "cpu":
        torch.get_device_module(accelerator.device).set_rng_state(state["device"])
