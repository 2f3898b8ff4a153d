"""What every method costs: time as a multiple of a plain CLIP image forward, peak memory, and operations counted.

    arm-hf benchmark --shape vit-b-16 --height 336 --width 448 --out bench_output

Weights are random unless a model is named; they change no time. Every candidate is timed right after a plain forward
of transformers (eager attention), round after round, and the ratio is the median over rounds of the two times: a
machine that slows down slows both. What is timed ends at the scores on the model's grid; the way to pixels depends on
the picture's size and is timed on its own. Words are encoded beforehand, as they are once per set of words.
"""

from __future__ import annotations

import copy
import gc
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from arm_hf import list_methods
from arm_hf.modeling.decision import QueryMaps, decide, window_boxes
from arm_hf.modeling.dense_clip import DenseCLIP, segment_images
from arm_hf.modeling.modeling_arm import ARMModel
from arm_hf.modeling.pamr import PAMR
from arm_hf.modeling.trunk import Padding

PLAIN = "plain CLIP forward, eager"
GROUPS = ("plain", "methods", "arm", "windows", "steps", "together")

# Width, blocks, heads, patch, image size, projection width of the CLIPs that the papers use.
SHAPES: dict[str, tuple[int, int, int, int, int, int]] = {
    "vit-b-32": (768, 12, 12, 32, 224, 512),
    "vit-b-16": (768, 12, 12, 16, 224, 512),
    "vit-l-14": (1024, 24, 16, 14, 224, 768),
    "vit-l-14-336": (1024, 24, 16, 14, 336, 768),
    "vit-h-14": (1280, 32, 16, 14, 224, 1024),
    "tiny": (64, 9, 2, 16, 64, 32),
}

# Upper bounds on the ratio to the plain forward; for steps and for ARM on what they add to it.
TARGETS: dict[str, float] = {
    **dict.fromkeys(("clip", "maskclip", "sclip", "clearclip", "naclip"), 1.02),
    "resclip, RCS": 1.06,
    "resclip, RCS + SFR": 1.6,
    "cliper": 1.2,
    "cliper, own windows": 2.2,
    "gem": 1.3,
    "clip_surgery": 1.06,
    "cliptrase": 1.1,
    "PAMR(10), 21 maps at full resolution": 0.5,
    "all methods from shared passes": 3.0,
}
ARM_TARGETS = {"ARM": 0.16, "ARM without feed-forward": 0.12}
DECISION_MIB = 2048.0


@dataclass(frozen=True)
class Candidate:
    """Something to measure.

    Attributes:
        name: What the table calls it.
        group: One of `GROUPS`.
        run: Does it once.
        host: Candidate whose time is subtracted; the target then bounds what is added.
        target: Upper bound on the ratio, or on what is added.
        most_mib: Upper bound on the peak of memory.
    """

    name: str
    group: str
    run: Callable[[], Any] = field(repr=False)
    host: str | None = None
    target: float | None = None
    most_mib: float | None = None


@dataclass(frozen=True)
class Row:
    """What was measured of a candidate.

    Attributes:
        name, group, target, most_mib: As in `Candidate`.
        milliseconds: Median time.
        ratio: Median of the time over that of the plain forward just before.
        low, high: Quartiles of that ratio.
        added: Median of the ratio minus the host's ratio in the same round, if there is a host.
        giga_flops: Multiply-adds of matrix products, convolutions and attention times two, in 1e9.
        flops_ratio: The same over the plain forward's.
        peak_mib: Greatest size of all tensors made during one run, weights and inputs not counted.
    """

    name: str
    group: str
    milliseconds: float
    ratio: float
    low: float
    high: float
    added: float | None
    giga_flops: float
    flops_ratio: float
    peak_mib: float
    target: float | None
    most_mib: float | None

    @property
    def measure(self) -> float:
        """What the target bounds."""
        return self.ratio if self.added is None else self.added


def build_clip(shape: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A CLIP of a named shape with random weights and a text tower of one small block.

    Args:
        shape: One of `SHAPES`.
        attention: Of transformers, "sdpa" or "eager".
        dtype: Of the weights.
        device: Where to.

    Raises:
        ValueError: There is no such shape.
    """
    from transformers import CLIPConfig, CLIPModel

    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")
    width, blocks, heads, patch, size, projection = SHAPES[shape]
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    text |= {"vocab_size": 64}
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": size,
    }
    config = CLIPConfig(projection_dim=projection, text_config=text, vision_config=vision, logit_scale_init_value=4.6)
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPModel(config).to(device, dtype).eval()


def eager_copy(clip: Any) -> Any:
    """The same CLIP, sharing its weights, with the attention that transformers computes eagerly."""
    shared = {id(tensor): tensor for tensor in (*clip.parameters(), *clip.buffers())}
    model = copy.deepcopy(clip, shared)
    model.set_attn_implementation("eager")
    return model


def candidates(
    clip: Any,
    pixels: Tensor,
    words: Tensor,
    methods: Sequence[str] | None = None,
    groups: Sequence[str] = GROUPS,
    arm: Any = None,
) -> tuple[list[Candidate], dict[str, str]]:
    """What is measured, and what cannot be measured here, with the reason.

    Args:
        clip: The CLIP.
        pixels: Normalised pixels, (B, 3, H, W).
        words: Class embeddings, (Q, D).
        methods: Names of methods; by default all.
        groups: Which of `GROUPS`.
        arm: An `ARMModel` on this CLIP; by default new ones, with and without feed-forward layers.
    """
    dense, eager = DenseCLIP(clip), eager_copy(clip)
    chosen = list_methods() if methods is None else list(methods)
    found = [Candidate(PLAIN, "plain", lambda: eager.get_image_features(pixels, interpolate_pos_encoding=True))]
    found.append(
        Candidate("plain, sdpa", "plain", lambda: clip.get_image_features(pixels, interpolate_pos_encoding=True))
    )

    def method(title: str, name: str, options: dict | None = None) -> None:
        def run() -> QueryMaps:
            return dense.query_maps(pixels, words, name, options)

        found.append(Candidate(title, "methods", run, None, TARGETS.get(title)))

    for name in chosen:
        if name == "resclip":
            method("resclip, RCS", name, {"sfr": False})
            method("resclip, RCS + SFR", name)
        else:
            method(name, name)
        if name == "cliper":
            method("cliper, own windows", name, {"window": 224, "window_stride": 112})

    models = {"ARM": arm or ARMModel.from_clip(clip).eval()}
    if arm is None:
        models["ARM without feed-forward"] = ARMModel.from_clip(clip, ffn_ratio=None).eval()
    for title, model in models.items():
        for name in [name for name in ("clearclip", "sclip", "gem", "clip") if name in chosen] or chosen[:1]:

            def refine(model: Any = model, name: str = name) -> Tensor:
                return model.query_maps(pixels, words, name).chunk()

            found.append(Candidate(f"{name} + {title}", "arm", refine, name, ARM_TARGETS.get(title)))

    found += _windows(dense, pixels, words, "sclip" if "sclip" in chosen else chosen[0])
    found += _steps(models["ARM"], pixels, words)
    found.append(
        Candidate(
            "all methods from shared passes",
            "together",
            lambda: _together(dense, pixels, words, [name for name in chosen if name not in left_out]),
            None,
            TARGETS["all methods from shared passes"] if methods is None else None,
        )
    )
    left_out: dict[str, str] = {}
    kept = []
    for candidate in found:
        if candidate.name != PLAIN and candidate.group not in groups:
            continue
        try:
            candidate.run()  # the first call also warms up
        except (ImportError, ValueError) as error:  # a method that wants other models
            left_out[candidate.name] = str(error)
            continue
        kept.append(candidate)
    return kept, left_out


def _windows(dense: DenseCLIP, pixels: Tensor, words: Tensor, name: str) -> list[Candidate]:
    """Sliding windows as one batch, and one after the other as the official code has them."""
    size = (pixels.shape[-2], pixels.shape[-1])
    side = min(*size, 224)
    boxes = window_boxes(size, side, side // 2)

    def maps(crops: Tensor) -> QueryMaps:
        return dense.query_maps(crops, words, name)

    def segment(batch: int) -> Any:
        return segment_images(
            maps, pixels, num_queries=len(words), window=side, stride=side // 2, window_batch_size=batch
        )

    many = f"{name}, {len(boxes)} windows of {side}"
    return [
        Candidate(f"{many}, one batch", "windows", lambda: segment(len(boxes))),
        Candidate(f"{many}, one by one", "windows", lambda: segment(1)),
    ]


def _steps(arm: Any, pixels: Tensor, words: Tensor) -> list[Candidate]:
    """What follows the maps: PAMR, and the decision at the size of a photo with many classes."""
    size = (pixels.shape[-2], pixels.shape[-1])
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(21, *size, generator=generator).to(pixels.device, torch.float32)
    pamr = "PAMR(10), 21 maps at full resolution"
    found = [Candidate(pamr, "steps", lambda: PAMR(pixels[:1])(scores), None, TARGETS[pamr])]
    width, grid = arm.config.hidden_size, (84, 112)
    for count in (21, 171, 847):
        maps = QueryMaps(
            torch.rand(1, count, 21, 28, generator=generator).to(pixels),
            torch.randn(1, width, *grid, generator=generator).to(pixels),
            F.normalize(torch.randn(count, width, generator=generator), dim=-1).to(pixels),
            "sigmoid",
            1.0,
            Padding(),
            (336, 448),
        )

        def run(maps: QueryMaps = maps, count: int = count) -> Any:
            return decide(maps, [(0, 0, 336, 448)], (336, 448), range(count), output_size=(1024, 1024))

        name = f"decision of {count} classes at 1024 x 1024"
        found.append(Candidate(name, "steps", run, most_mib=DECISION_MIB))
    return found


def _together(dense: DenseCLIP, pixels: Tensor, words: Tensor, methods: Sequence[str]) -> int:
    """Maps of all methods, one trunk pass for all that resize the position table alike."""
    count = 0
    for rule, members in dense.group_by_position_rule(dict.fromkeys(methods)).items():
        trunk = dense.shared_trunk(pixels, rule, members)
        for _, method, settings, _ in members:
            try:
                dense.maps_of(dense.apply(method, settings, trunk, words), words)
            except (ImportError, ValueError):  # wants another model: named where it is measured alone
                continue
            count += 1
    return count


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


def count_flops(run: Callable[[], Any]) -> int:
    """Operations of matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    found: Sequence[Candidate], rounds: int = 7, device: str = "cpu", threads: int | None = None, progress: bool = False
) -> list[Row]:
    """Measure candidates; the first one must be the plain forward.

    Args:
        found: From `candidates`.
        rounds: Times that each is run after a plain forward.
        device: Where they run.
        threads: Threads of torch on the CPU.
        progress: Show a progress bar.

    Raises:
        ValueError: There is no plain forward at the head, or no round.
    """
    from tqdm import tqdm

    if not found or found[0].name != PLAIN or rounds < 1:
        raise ValueError(f"measuring needs {PLAIN!r} first and at least one round")
    plain, others = found[0], list(found[1:])

    def seconds(candidate: Candidate) -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        began = time.perf_counter()
        candidate.run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - began

    times: dict[str, list[float]] = {candidate.name: [] for candidate in found}
    ratios: dict[str, list[float]] = {candidate.name: [] for candidate in found}
    with torch.inference_mode(), _threads(threads):
        flops = {candidate.name: count_flops(candidate.run) for candidate in found}
        memory = {candidate.name: measure_memory(candidate.run, device) for candidate in found}
        seconds(plain)
        steps = tqdm(total=rounds * len(others), disable=not progress, unit="run")
        with steps:
            for _ in range(rounds):
                for candidate in others:
                    steps.set_postfix_str(candidate.name[:40], refresh=False)
                    reference, own = seconds(plain), seconds(candidate)
                    times[PLAIN].append(reference)
                    ratios[PLAIN].append(1.0)
                    times[candidate.name].append(own)
                    ratios[candidate.name].append(own / reference)
                    steps.update()
    rows = []
    for candidate in found:
        values = ratios[candidate.name] or [1.0]
        added = None
        if candidate.host in ratios:
            added = statistics.median(a - b for a, b in zip(values, ratios[candidate.host], strict=True))
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        rows.append(
            Row(
                name=candidate.name,
                group=candidate.group,
                milliseconds=round(1e3 * statistics.median(times[candidate.name] or [0.0]), 2),
                ratio=round(statistics.median(values), 3),
                low=round(low, 3),
                high=round(high, 3),
                added=None if added is None else round(added, 3),
                giga_flops=round(flops[candidate.name] / 1e9, 3),
                flops_ratio=round(flops[candidate.name] / max(1, flops[PLAIN]), 3),
                peak_mib=round(memory[candidate.name] / 2**20, 1),
                target=candidate.target,
                most_mib=candidate.most_mib,
            )
        )
    return rows


def machine(device: str, dtype: torch.dtype, threads: int | None) -> dict[str, Any]:
    """What the figures depend on beside the code.

    Args:
        device: Where the candidates ran.
        dtype: Of the weights.
        threads: Of torch on the CPU; None is torch's own choice.
    """
    import transformers

    named = torch.cuda.get_device_name() if device.startswith("cuda") else _processor()
    return {
        "device": named,
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


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; "target" says what bound a row has and whether it keeps it."""
    lines = [
        "| | ms | x plain (quartiles) | added | GFLOP | x plain | peak MiB | target |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        target = ""
        if row.target is not None:
            target = f"{'met' if row.measure <= row.target else 'missed'}: {row.target:g}"
        if row.most_mib is not None:
            target = f"{'met' if row.peak_mib <= row.most_mib else 'missed'}: {row.most_mib:g} MiB"
        added = "" if row.added is None else f"{row.added:+.2f}"
        lines.append(
            f"| {row.name} | {row.milliseconds:.1f} | {row.ratio:.2f} ({row.low:.2f} to {row.high:.2f}) | {added} | "
            f"{row.giga_flops:.1f} | {row.flops_ratio:.2f} | {row.peak_mib:.0f} | {target} |"
        )
    return "\n".join(lines)


def report(rows: Sequence[Row], left_out: dict[str, str], setting: dict[str, Any], where: dict[str, Any]) -> dict:
    """Everything, as values for JSON.

    Args:
        rows: What was measured.
        left_out: Reason for each candidate that was not.
        setting: Model, image and classes.
        where: Of `machine`.
    """
    return {"setting": setting, "machine": where, "rows": [asdict(row) for row in rows], "not_measured": left_out}
