"""What a run over millions of pictures costs: a simulation of `arm-hf segment` on many machines that fail at times.

    python -m arm_hf.scaling --images 10000000 --machines 16 --rate 60

Every process of every machine takes its shards in order (`Part`), loses what is in flight when its machine fails, and
begins again with the manifests, as `arm-hf segment --resume` does. See MANY_IMAGES.md for the figures and how they
were found.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

_HOUR, _MEBI = 3600.0, 2.0**20


@dataclass(frozen=True)
class Fleet:
    """The work, the machines, and what was measured on one process.

    Attributes:
        images: Pictures.
        machines: Machines that share a file system.
        processes: Processes on each machine, usually one per GPU.
        rate: Pictures a second of one process.
        images_per_shard: Pictures in a parquet file.
        hours_between_failures: Mean time between failures of a machine (exponential).
        minutes_to_return: Until a machine that failed is back, or another takes its part.
        start_seconds: From the start of a process to its first picture: imports, weights, text.
        in_flight: Pictures that a kill costs a process: those read ahead, waiting for their shape, or being written.
        image_bytes: Mean size of an encoded picture.
        result_bytes: Mean size of label map and legend together.
        overlay_bytes: Mean size of the picture for people, 0 without.
        record_bytes: Mean length of a line of the manifest.
        read_rate: Bytes a second that one process reads.
        records_rate: Lines of the manifests that one process reads a second when it resumes.
        stat_seconds: Time to ask whether one file is there, when it resumes.
    """

    images: int = 10_000_000
    machines: int = 16
    processes: int = 8
    rate: float = 60.0
    images_per_shard: int = 10_000
    hours_between_failures: float = 200.0
    minutes_to_return: float = 10.0
    start_seconds: float = 40.0
    in_flight: int = 150
    image_bytes: float = 120e3
    result_bytes: float = 7e3
    overlay_bytes: float = 0.0
    record_bytes: float = 190.0
    read_rate: float = 200e6
    records_rate: float = 250e3
    stat_seconds: float = 20e-6

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < (0 if name in ("in_flight", "overlay_bytes", "minutes_to_return") else 1e-12):
                raise ValueError(f"{name} must be positive, got {value}")


@dataclass(frozen=True)
class Outcome:
    """What a simulated run comes to.

    Attributes:
        hours: Until the last process is done.
        ideal_hours: With equal shares and no failure.
        failures: Failures of machines during the run.
        repeated: Pictures that were computed twice.
        restart_hours: Process hours spent on starting, reading manifests and passing over finished rows.
        idle_hours: Process hours between the end of a process and the end of the run.
        shards: Parquet files.
        files: Result files.
        input_bytes, output_bytes, manifest_bytes: Storage.
    """

    hours: float
    ideal_hours: float
    failures: int
    repeated: int
    restart_hours: float
    idle_hours: float
    shards: int
    files: int
    input_bytes: float
    output_bytes: float
    manifest_bytes: float

    @property
    def overhead(self) -> float:
        """Share of the time that is lost to failures and to unequal shares."""
        return self.hours / self.ideal_hours - 1


@dataclass
class _Process:
    """One process: pictures of each of its shards, what it has finished, and its clock in seconds."""

    shards: list[int]
    done: int = 0
    seconds: float = 0.0
    repeated: int = 0
    restart_seconds: float = 0.0
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.total = sum(self.shards)


def shares(images: int, images_per_shard: int, count: int) -> list[list[int]]:
    """Pictures in the shards of each process: whole files where there are enough, else every count-th row of all.

    Args:
        images: Pictures.
        images_per_shard: Pictures in a file.
        count: Number of processes.
    """
    sizes = [min(images_per_shard, images - start) for start in range(0, images, images_per_shard)]
    if len(sizes) >= count:
        return [sizes[index::count] for index in range(count)]
    return [[len(range(size)[index::count]) for size in sizes] for index in range(count)]


def simulate(fleet: Fleet, seed: int = 0) -> Outcome:
    """Run the fleet once.

    A process is as fast as the model or as reading, whatever is slower. A failure of a machine kills its processes:
    each repeats up to `in_flight` pictures, and before it goes on reads all manifests, asks for the files of what it
    had finished in the current shard and passes over these rows.

    Args:
        fleet: Work and machines.
        seed: Of the failures.
    """
    random = np.random.default_rng(seed)
    count = fleet.machines * fleet.processes
    processes = [_Process(part) for part in shares(fleet.images, fleet.images_per_shard, count)]
    by_files = -(-fleet.images // fleet.images_per_shard) >= count
    ideal_hours = fleet.images / (fleet.rate * count) / _HOUR
    # Without a file for every process each reads all rows for its share of them.
    bytes_per_picture = fleet.image_bytes * (1 if by_files else count)
    fleet = replace(fleet, rate=min(fleet.rate, fleet.read_rate / bytes_per_picture))
    failures = 0
    for machine in range(fleet.machines):
        members = processes[machine * fleet.processes : (machine + 1) * fleet.processes]
        for process in members:
            process.seconds = fleet.start_seconds
        while any(process.done < process.total for process in members):
            until = min(process.seconds for process in members if process.done < process.total)
            failure = until + random.exponential(fleet.hours_between_failures * _HOUR)
            failures += _run_until(members, fleet, failure, by_files, count)
    hours = max(process.seconds for process in processes) / _HOUR
    files = fleet.images * (3 if fleet.overlay_bytes else 2)
    return Outcome(
        hours=hours,
        ideal_hours=ideal_hours,
        failures=failures,
        repeated=sum(process.repeated for process in processes),
        restart_hours=sum(process.restart_seconds for process in processes) / _HOUR,
        idle_hours=sum(hours - process.seconds / _HOUR for process in processes),
        shards=-(-fleet.images // fleet.images_per_shard),
        files=files,
        input_bytes=fleet.images * fleet.image_bytes,
        output_bytes=fleet.images * (fleet.result_bytes + fleet.overlay_bytes),
        manifest_bytes=fleet.images * fleet.record_bytes,
    )


def _run_until(members: list[_Process], fleet: Fleet, failure: float, by_files: bool, count: int) -> int:
    """Run a machine's processes to the failure, or to their end; return 1 if the failure hit any of them."""
    hit = 0
    for process in members:
        if process.done == process.total:
            continue
        possible = int(max(0.0, failure - process.seconds) * fleet.rate)
        left = process.total - process.done
        if possible >= left:
            process.done = process.total
            process.seconds += left / fleet.rate
            continue
        hit = 1
        lost = min(fleet.in_flight, process.done + possible)
        process.done += possible - lost
        process.repeated += lost
        into_shard = _into_shard(process.shards, process.done)
        passed_bytes = into_shard * fleet.image_bytes * (1 if by_files else count)
        restart = (
            fleet.start_seconds
            + min(fleet.images, process.done * count) / fleet.records_rate
            + 2 * into_shard * fleet.stat_seconds
            + passed_bytes / fleet.read_rate
        )
        process.restart_seconds += restart
        process.seconds = failure + fleet.minutes_to_return * 60 + restart
    return hit


def _into_shard(sizes: list[int], done: int) -> int:
    """Pictures that are done in the shard that is under way."""
    for size in sizes:
        if done < size:
            return done
        done -= size
    return 0


def table(fleets: list[Fleet], seed: int = 0) -> str:
    """A Markdown table of simulated runs.

    Args:
        fleets: One row each.
        seed: Of the failures.
    """
    lines = [
        "| machines x processes | pictures per shard | shards | hours (ideal) | failures | repeated pictures | "
        "restarting, process hours | waiting for the last, process hours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for fleet in fleets:
        found = simulate(fleet, seed)
        lines.append(
            f"| {fleet.machines} x {fleet.processes} | {fleet.images_per_shard:,} | {found.shards:,} | "
            f"{found.hours:.2f} ({found.ideal_hours:.2f}) | {found.failures} | {found.repeated:,} | "
            f"{found.restart_hours:.2f} | {found.idle_hours:.1f} |"
        )
    return "\n".join(lines)


def storage(fleet: Fleet) -> str:
    """A Markdown table of what lies on the disk."""
    found = simulate(replace(fleet, hours_between_failures=1e9))
    rows: list[tuple[str, float, Any]] = [
        ("pictures, in parquet", found.input_bytes, f"{found.shards:,}"),
        ("label maps and legends", fleet.images * fleet.result_bytes, f"{2 * fleet.images:,}"),
        ("overlays, if wanted", fleet.images * fleet.overlay_bytes, f"{fleet.images if fleet.overlay_bytes else 0:,}"),
        ("manifests", found.manifest_bytes, f"{fleet.machines * fleet.processes:,}"),
    ]
    lines = ["| what | size | files |", "|---|---|---|"]
    lines += [f"| {what} | {size / _MEBI / 1024:,.1f} GiB | {files} |" for what, size, files in rows]
    return "\n".join(lines)


def main() -> None:
    """Print the simulation of one fleet with shards of several sizes."""
    parser = argparse.ArgumentParser(prog="python -m arm_hf.scaling", description=__doc__.splitlines()[0])
    for name, default in asdict(Fleet()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    seed = options.pop("seed")
    fleet = Fleet(**options)
    sizes = sorted({1_000, fleet.images_per_shard, 100_000})
    print(table([replace(fleet, images_per_shard=size) for size in sizes], seed))
    print()
    print(storage(fleet))


if __name__ == "__main__":
    main()
