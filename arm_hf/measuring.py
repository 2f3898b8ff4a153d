"""Time, memory and operations of things to run, each against a reference that runs right before it.

A machine that slows down slows both, so it is the ratio that is kept, round after round, and its median that counts.
"""

from __future__ import annotations

import gc
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from arm_hf.floors import Bare, Work, count_work

BOUNDS = ("ratio", "added", "over", "mib")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CLOSE = 0.1  # share of a target by which the median of a few rounds may be off on a busy machine
MORE_ROUNDS = 2


@dataclass(frozen=True)
class Candidate:
    """Something to measure.

    Attributes:
        name: What the table calls it.
        run: Does it once.
        host: What it is compared with beside the reference, run right before it.
        continues: `run` takes the host's result and goes on from there: its time is the host's and its own. What is
            added to a host is far smaller than the host's own spread, so that two whole runs hardly show it.
        needed: The part of it that no other program can leave out; alone it takes the least that `run` can take.
        target: Upper bound.
        bound: What the target bounds: "ratio" to the reference, "added" to the host's ratio, time "over" the host's.
        note: Remark for the table.
    """

    name: str
    run: Callable[..., Any] = field(repr=False)
    host: Callable[[], Any] | None = field(default=None, repr=False)
    target: float | None = None
    bound: str = "ratio"
    note: str = ""
    continues: bool = False
    needed: Callable[[], Any] | None = field(default=None, repr=False)

    def once(self) -> Any:
        """All of it, the host's part included where it continues."""
        return self.run(self.host()) if self.continues and self.host is not None else self.run()


@dataclass(frozen=True)
class Row:
    """What was measured of a candidate; None is what was not.

    Attributes:
        name, target, bound, note: As in `Candidate`; the bound may also be "mib", on the peak of memory.
        section: Part of the benchmark.
        milliseconds: Median time.
        ratio: Median of the time over that of the reference just before.
        low, high: Quartiles of that ratio.
        least: Its minimum.
        added: Median of (time - host's time) / reference's time of a round.
        over: Median of time / host's time.
        giga_flops: Multiply-adds of matrix products, convolutions and attention times two, in 1e9.
        flops_ratio: The same over the reference's.
        flops_added, flops_over: What the host's leave of it, like `added` and `over`.
        floor: Least that the bounded value can be on this machine, see `floors`; None where nothing is bounded.
        peak_mib: Greatest size of all tensors made during one run, or what a process of its own grew by.
        rounds: Number of measurements.
    """

    name: str
    section: str
    milliseconds: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    least: float | None = None
    added: float | None = None
    over: float | None = None
    giga_flops: float | None = None
    flops_ratio: float | None = None
    flops_added: float | None = None
    flops_over: float | None = None
    floor: float | None = None
    peak_mib: float | None = None
    rounds: int | None = None
    target: float | None = None
    bound: str = "ratio"
    note: str = ""

    @property
    def value(self) -> float | None:
        """What the target bounds."""
        return self.peak_mib if self.bound == "mib" else getattr(self, self.bound)

    @property
    def verdict(self) -> str:
        """ "met"; "floor" where bare operations alone exceed the target; else "missed"; "" without a target."""
        if self.target is None or self.value is None:
            return ""
        if self.value <= self.target:
            return "met"
        return "floor" if self.floor is not None and self.floor > self.target else "missed"


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside, and remembers the most that were alive at once.

    Buffers inside a kernel do not show. On CUDA the allocator's own count is better (`measure_memory`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        given = {id(each.untyped_storage()) for each in _tensors((arguments, options))}
        for each in _tensors(result):
            storage = each.untyped_storage()
            key = id(storage)
            if key not in self._known and key not in given and storage.nbytes():
                self._known.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def measure_memory(run: Callable[[], Any], device: str) -> int:
    """Bytes alive at the peak of a run.

    Args:
        run: What is measured; it is called once.
        device: Where it runs.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        run()
    return memory.peak


def resident_mib(peak: bool = False) -> float:
    """Memory of this process, now or at its highest so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would also count what the parent had when it started this process
        name = "VmHWM" if peak else "VmRSS"
        found = re.search(rf"{name}:\s+(\d+) kB", status.read_text(encoding="ascii"))
        if found:
            return int(found[1]) / 1024
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 2**20 if sys.platform == "darwin" else size / 1024


def run_in_child(code: str, timeout: float = 300) -> float:
    """Run Python code in a process of its own and return the number that it prints last.

    Args:
        code: Program text.
        timeout: Seconds.

    Raises:
        RuntimeError: The process failed; its last line of error is in the message.
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return float(done.stdout.split()[-1])


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads on the CPU inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    reference: Callable[[], Any],
    candidates: Sequence[Candidate],
    section: str,
    rounds: int = 7,
    device: str = "cpu",
    clock: str = "wall",
    progress: Any = None,
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """Measure candidates of one section.

    Args:
        reference: What all times are divided by.
        candidates: What to measure; each has run once already.
        section: Name of the section.
        rounds: Times that each is run after the reference. A candidate whose median is then close to its target is
            run `MORE_ROUNDS` times as often again.
        device: Where they run.
        clock: "wall", or "cpu" for the processor's time, which other processes disturb less; only with one thread.
        progress: A bar of tqdm, updated once for every run of a candidate; its total grows by the runs that are added.
        dtype: Of the bare products that floors are made of.

    Raises:
        ValueError: There is no round, or no such clock.
    """
    if rounds < 1 or clock not in CLOCKS:
        raise ValueError(
            f"measuring needs at least one round and a clock of {', '.join(CLOCKS)}; got {rounds}, {clock}"
        )
    now = CLOCKS[clock]

    def seconds(run: Callable[[], Any]) -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        began = now()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return max(now() - began, 1e-9)

    times: dict[str, list[tuple[float, float, float | None]]] = {candidate.name: [] for candidate in candidates}
    floors: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}

    def once_each(some: Sequence[Candidate]) -> None:
        for candidate in some:
            if progress is not None:
                progress.set_postfix_str(candidate.name[:40], refresh=False)
            base = seconds(reference)
            host, own = _run(candidate, seconds)
            times[candidate.name].append((base, own, host))
            if candidate.target is not None:
                least = bare.speed(seconds)
                bound = _floor(candidate, counts[candidate.name], hosts[candidate.name], least, base, host)
                needed = 0.0 if candidate.needed is None else seconds(candidate.needed) / base
                floors[candidate.name].append(max(bound, needed))
            if progress is not None:
                progress.update()

    with torch.inference_mode():
        bare = Bare(device, dtype)
        plain = max(1, count_work(reference).flops)
        counts = {each.name: count_work(each.once) for each in candidates}
        hosts = {each.name: None if each.host is None else count_work(each.host) for each in candidates}
        memory = {each.name: measure_memory(each.once, device) for each in candidates}
        for _ in range(rounds):
            once_each(candidates)
        close = [each for each in candidates if _is_close(each, times[each.name])]
        if progress is not None:
            progress.total += MORE_ROUNDS * rounds * len(close)
        for _ in range(MORE_ROUNDS * rounds):
            once_each(close)
    rows = []
    for candidate in candidates:
        measured = times[candidate.name]
        ratios, added, over = (_values(measured, bound) for bound in ("ratio", "added", "over"))
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        flops, host_work = counts[candidate.name].flops, hosts[candidate.name]
        under = None if host_work is None else host_work.flops
        rows.append(
            Row(
                name=candidate.name,
                section=section,
                milliseconds=round(1e3 * statistics.median(own for _, own, _ in measured), 2),
                ratio=round(middle, 3),
                low=round(low, 3),
                high=round(high, 3),
                least=round(min(ratios), 3),
                added=_median(added),
                over=_median(over),
                giga_flops=round(flops / 1e9, 3),
                flops_ratio=round(flops / plain, 3),
                flops_added=None if under is None else round((flops - under) / plain, 3),
                flops_over=None if under is None else round(flops / max(1, under), 3),
                floor=_median(floors[candidate.name]),
                peak_mib=round(memory[candidate.name] / 2**20, 1),
                rounds=len(measured),
                target=candidate.target,
                bound=candidate.bound,
                note=candidate.note,
            )
        )
    return rows


def _run(candidate: Candidate, seconds: Callable[[Callable[[], Any]], float]) -> tuple[float | None, float]:
    """Time of the host, if there is one, and of the candidate."""
    if candidate.host is None:
        return None, seconds(candidate.run)
    if not candidate.continues:
        return seconds(candidate.host), seconds(candidate.run)
    found, run_host = [], candidate.host
    host = seconds(lambda: found.append(run_host()))
    return host, host + seconds(lambda: candidate.run(found[0]))


def _values(measured: Sequence[tuple[float, float, float | None]], bound: str) -> list[float]:
    """What a bound bounds, of every round's times of reference, candidate and host."""
    if bound == "ratio":
        return [own / base for base, own, _ in measured]
    pairs = [(base, own, host) for base, own, host in measured if host is not None]
    return [own / host if bound == "over" else (own - host) / base for base, own, host in pairs]


def _is_close(candidate: Candidate, measured: Sequence[tuple[float, float, float | None]]) -> bool:
    """Whether the rounds so far, whichever side they are on, are too few to tell the target from the median."""
    middle = _median(_values(measured, candidate.bound))
    return candidate.target is not None and middle is not None and abs(middle / candidate.target - 1) < CLOSE


def _floor(
    candidate: Candidate,
    work: Work,
    host_work: Work | None,
    least: Callable[[Work], float],
    base: float,
    host: float | None,
) -> float:
    """Least that the bounded value can be, from times of one round."""
    if candidate.bound == "over" and host is not None:
        return least(work) / host
    if candidate.bound == "added" and host_work is not None:
        work -= host_work
    return least(work) / base


def _median(values: Any) -> float | None:
    values = list(values)
    return round(statistics.median(values), 3) if values else None


def machine(device: str, dtype: torch.dtype, threads: int | None) -> dict[str, Any]:
    """What the figures depend on beside the code; nothing that names this machine.

    Args:
        device: Where the candidates ran.
        dtype: Of the weights.
        threads: Of torch on the CPU; None is torch's own choice.
    """
    import transformers

    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else _processor(),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
