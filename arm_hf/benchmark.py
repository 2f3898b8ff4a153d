"""What every method costs: time as a multiple of a plain CLIP image forward, peak memory, and operations counted.

    arm-hf benchmark --shape vit-b-16 --height 336 --width 448 --out bench_output

Weights are random unless a model is named; they change no time. The reference is the image forward of transformers with
eager attention, and every candidate runs right after one. What is timed ends at the scores on the model's grid; the way
to pixels depends on the picture's size and is timed on its own. Words are encoded beforehand, as they are once per set
of words.
"""

from __future__ import annotations

import copy
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from arm_hf import list_methods
from arm_hf.measuring import Candidate, Row, measure, resident_mib, run_in_child
from arm_hf.modeling.arm import fuse
from arm_hf.modeling.decision import QueryMaps, decide, window_boxes
from arm_hf.modeling.dense_clip import DenseCLIP, segment_images
from arm_hf.modeling.modeling_arm import ARMModel
from arm_hf.modeling.pamr import PAMR
from arm_hf.modeling.trunk import COMMON_POSITION_RULE, Padding, TrunkRequest

SECTIONS = ("methods", "arm", "windows", "pamr", "together", "memory", "bf16", "compile")
OPT_IN = ("bf16", "compile")

# Width, blocks, heads, patch, image size, projection width of the CLIPs that the papers use.
SHAPES: dict[str, tuple[int, int, int, int, int, int]] = {
    "vit-b-32": (768, 12, 12, 32, 224, 512),
    "vit-b-16": (768, 12, 12, 16, 224, 512),
    "vit-l-14": (1024, 24, 16, 14, 224, 768),
    "vit-l-14-336": (1024, 24, 16, 14, 336, 768),
    "vit-h-14": (1280, 32, 16, 14, 224, 1024),
    "tiny": (64, 9, 2, 16, 64, 32),
}

# Upper bounds on the ratio to the plain forward, stated for ViT-B/16 and one image of 336 x 448 pixels.
TARGETS: dict[str, float] = {
    **dict.fromkeys(("clip", "maskclip", "sclip", "clearclip", "naclip"), 1.02),
    "resclip, RCS": 1.06,
    "resclip, RCS + SFR": 1.6,
    "cliper": 1.2,
    "cliper, own windows": 2.2,
    "gem": 1.3,
    "clip_surgery": 1.06,
    "cliptrase": 1.1,
}
PAMR_TARGET = 0.5  # added
ARM_TARGETS = {"ARM": 0.16, "ARM without feed-forward": 0.12}  # added to the host's ratio
WINDOWS_TARGET = 1.0  # over the windows one by one
TOGETHER_TARGET = 3.0
DECISION_MIB = 2048.0
ARM_HOSTS = ("clearclip", "sclip", "gem", "clip")


@dataclass
class Bench:
    """What all sections share.

    Attributes:
        clip: The CLIP.
        pixels: Normalised pixels, (B, 3, H, W).
        words: Class embeddings, (Q, D).
        methods: Names of methods; by default all that run without another model's features.
        arm: An `ARMModel` on this CLIP; by default new ones, with and without feed-forward layers.
        left_out: What cannot be measured here, with the reason; filled on the way.
    """

    clip: Any
    pixels: Tensor
    words: Tensor
    methods: Sequence[str] | None = None
    arm: Any = None
    left_out: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        eager = eager_copy(self.clip)
        self.dense = DenseCLIP(self.clip)
        self.reference = lambda: eager.get_image_features(self.pixels, interpolate_pos_encoding=True)
        self.standard = self.methods is None
        self.methods = [name for name in self.methods or list_methods() if self._runs(name)]

    def _runs(self, name: str) -> bool:
        try:
            with torch.inference_mode():
                self.dense.query_maps(self.pixels, self.words, name)
        except (ImportError, ValueError) as error:  # it wants another model's features, or an extra
            self.left_out[name] = str(error)
            return False
        return True

    def method(self, name: str, **options: Any) -> Callable[[], QueryMaps]:
        """A run of a method up to its scores.

        Args:
            name: Registered method.
            options: Its settings.
        """
        return lambda: self.dense.query_maps(self.pixels, self.words, name, options)


def build_clip(shape: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A CLIP of a named shape with random weights and a text tower of one small block.

    Args:
        shape: One of `SHAPES`.
        attention: Of transformers, such as "sdpa" or "eager".
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


def _methods(bench: Bench) -> list[Candidate]:
    def plain() -> Any:
        return bench.clip.get_image_features(bench.pixels, interpolate_pos_encoding=True)

    found = [Candidate("plain CLIP forward again", bench.reference), Candidate("plain CLIP forward, sdpa", plain)]
    for name in bench.methods or ():
        if name == "resclip":
            title = "resclip, RCS"
            found.append(Candidate(title, bench.method(name, sfr=False), target=TARGETS[title]))
            title = "resclip, RCS + SFR"
            found.append(Candidate(title, bench.method(name), target=TARGETS[title]))
        else:
            found.append(Candidate(name, bench.method(name), target=TARGETS.get(name)))
    return found


def _arm(bench: Bench) -> list[Candidate]:
    models = {"ARM": bench.arm or ARMModel.from_clip(bench.clip).eval()}
    if bench.arm is None:
        models["ARM without feed-forward"] = ARMModel.from_clip(bench.clip, ffn_ratio=None).eval()
    names = bench.methods or ()
    found = []
    for title, model in models.items():
        for name in [name for name in names if name in ARM_HOSTS] or names[:1]:

            def see(model: Any = model, name: str = name) -> Any:
                features = model.features(bench.pixels, name, class_embeddings=bench.words)
                return features, model.coarse_map(features, bench.words)

            def refine(seen: Any, model: Any = model) -> Tensor:
                features, coarse = seen
                return fuse(coarse, model.refinement_features(features, bench.words))

            target = ARM_TARGETS.get(title)
            found.append(Candidate(f"{name} + {title}", refine, see, target, "added", continues=True))
    return found


def _windows(bench: Bench) -> list[Candidate]:
    """Sliding windows as one batch, and one after the other as the authors' code has them."""
    size = (bench.pixels.shape[-2], bench.pixels.shape[-1])
    side = min(*size, 224)
    boxes = window_boxes(size, side, side // 2)
    names = bench.methods or ()
    name = "sclip" if "sclip" in names else names[0]

    def segment(batch: int) -> Callable[[], Any]:
        return lambda: segment_images(
            lambda crops: bench.dense.query_maps(crops, bench.words, name),
            bench.pixels,
            num_queries=len(bench.words),
            window=side,
            stride=side // 2,
            window_batch_size=batch,
        )

    batch, alone = segment(len(boxes)), segment(1)
    title = f"{name}, {len(boxes)} windows of {side}, one batch"
    found = [Candidate(title, batch, alone, WINDOWS_TARGET, "over", "over one window at a time, decision included")]
    if "cliper" in names:
        title, patch = "cliper, own windows", bench.dense.tower.patch_size
        side -= side % patch
        stride = max(patch, side // 2 // patch * patch)
        run = bench.method("cliper", window=side, window_stride=stride)
        boxes = window_boxes(size, side, stride)
        crops = torch.cat([bench.pixels[..., top:bottom, left:right] for top, left, bottom, right in boxes])

        def passes() -> None:
            for pixels in (bench.pixels, crops):
                _stream_products(bench.dense, pixels)

        note = f"{len(boxes)} windows of {side} and the whole; floor: their passes and the products of every stream"
        found.append(Candidate(title, run, target=TARGETS[title], note=note, needed=passes))
    return found


def _stream_products(dense: DenseCLIP, pixels: Tensor) -> None:
    """Of CLIPer only what nobody can leave out: the unchanged blocks, and for the input of every block the value and
    output projections of the last one. No map is kept, no stream normalised or attended, no word looked at."""
    states = tuple(range(dense.tower.num_blocks))
    trunk = dense.run_trunk(pixels, TrunkRequest(states))
    attention = dense.tower.last_block.self_attn
    for state in trunk.hidden_states.values():
        attention.out_proj(attention.v_proj(state))


def _pamr(bench: Bench) -> list[Candidate]:
    size = (bench.pixels.shape[-2], bench.pixels.shape[-1])
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(21, *size, generator=generator).to(bench.pixels.device, torch.float32)
    image = bench.pixels[:1]
    return [Candidate("PAMR(10), 21 maps at full resolution", lambda: PAMR(image)(scores), target=PAMR_TARGET)]


def _together(bench: Bench) -> list[Candidate]:
    """Maps of all methods from shared trunk passes: of one where all have one position table, else of one for each."""
    dense, names = bench.dense, list(bench.methods or ())
    size = (bench.pixels.shape[-2], bench.pixels.shape[-1])

    def candidate(title: str, options: dict[str, Any] | None, target: float | None) -> Candidate:
        groups = dense.group_by_position_rule(dict.fromkeys(names, options), size)

        def shared() -> None:
            for rule, members in groups.items():
                trunk = dense.shared_trunk(bench.pixels, rule, members)
                for _, method, settings, _ in members:
                    dense.maps_of(dense.apply(method, settings, trunk, bench.words), bench.words)

        def alone() -> None:
            for name in names:
                dense.query_maps(bench.pixels, bench.words, name, options)

        note = f"{len(names)} methods, {len(groups)} trunk passes"
        return Candidate(title, shared, alone, target, "ratio", note)

    common = {"position_rule": COMMON_POSITION_RULE}
    target = TOGETHER_TARGET if bench.standard else None
    return [
        candidate("all methods, one position table (--common-input)", common, target),
        candidate("all methods, each with its code's position table", None, None),
    ]


def decision_peak(count: int, side: int = 1024) -> float:
    """MiB by which this process grows while it decides `count` classes at side x side; in a process of its own.

    The maps are those of a ViT-B/16 with ARM for 336 x 448 pixels, and are counted with it.

    Args:
        count: Number of classes.
        side: Height and width of the label map in pixels.
    """
    before = resident_mib()
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        maps = QueryMaps(
            torch.rand(1, count, 21, 28, generator=generator),
            torch.randn(1, 512, 84, 112, generator=generator),
            F.normalize(torch.randn(count, 512, generator=generator), dim=-1),
            "sigmoid",
            1.0,
            Padding(),
            (336, 448),
        )
        decide(maps, [(0, 0, 336, 448)], (336, 448), range(count), output_size=(side, side))
    return resident_mib(peak=True) - before


def _memory() -> Iterator[Row]:
    for count in (171, 847):
        code = f"from arm_hf.benchmark import decision_peak; print(decision_peak({count}))"
        peak = run_in_child(code)
        yield Row(
            f"decision of {count} classes at 1024 x 1024",
            "memory",
            peak_mib=round(peak, 1),
            target=DECISION_MIB,
            bound="mib",
            note="growth of a process that does nothing else",
        )


def _other_dtype(bench: Bench) -> list[Candidate]:
    """The first method and the plain forward with all weights in bfloat16."""
    name = _plain_method(bench)
    half = DenseCLIP(copy.deepcopy(bench.clip).to(torch.bfloat16))
    pixels, words = bench.pixels.to(torch.bfloat16), bench.words.to(torch.bfloat16)
    own = bench.method(name)

    def run() -> QueryMaps:
        return half.query_maps(pixels, words, name)

    return [Candidate(f"{name} in bfloat16", run, own, bound="over", note=_difference(own(), run()))]


def _compiled(bench: Bench) -> list[Candidate]:
    """The same method as `torch.compile` makes it."""
    if not bench.pixels.is_cuda and shutil.which("c++") is None and shutil.which("g++") is None:
        raise ValueError("torch.compile needs a C++ compiler on the CPU, and neither c++ nor g++ is on the path")
    name = _plain_method(bench)
    own = bench.method(name)
    compiled = torch.compile(lambda pixels: bench.dense.query_maps(pixels, bench.words, name).coarse, dynamic=False)
    began = time.perf_counter()
    coarse = compiled(bench.pixels)
    note = f"compiled in {time.perf_counter() - began:.0f} s; {_difference(own(), coarse)}"
    return [Candidate(f"{name} compiled", lambda: compiled(bench.pixels), own, bound="over", note=note)]


def _plain_method(bench: Bench) -> str:
    names = bench.methods or ()
    return "clearclip" if "clearclip" in names else names[0]


def _difference(own: QueryMaps, other: Any) -> str:
    """How far other scores are from float32's, in words."""
    coarse = other.coarse if isinstance(other, QueryMaps) else other
    largest = (own.coarse.float() - coarse.float()).abs().max().item()
    same = (own.coarse.argmax(dim=1) == coarse.argmax(dim=1)).float().mean().item()
    return f"scores differ by at most {largest:.1e}, {100 * same:.1f}% of the patches keep their label"


BUILDERS: dict[str, Callable[[Bench], list[Candidate]]] = {
    "methods": _methods,
    "arm": _arm,
    "windows": _windows,
    "pamr": _pamr,
    "together": _together,
    "bf16": _other_dtype,
    "compile": _compiled,
}


def run_sections(
    bench: Bench,
    sections: Sequence[str],
    rounds: int = 7,
    device: str = "cpu",
    clock: str = "wall",
    progress: bool = False,
) -> Iterator[list[Row]]:
    """Measure section after section; what cannot be measured goes to `bench.left_out`.

    Args:
        bench: Model, image and words.
        sections: Which of `SECTIONS`.
        rounds: Times that each candidate is run, see `measure`.
        device: Where the model is.
        clock: See `measure`.
        progress: Show a bar for every section.

    Yields:
        The rows of a section.
    """
    from tqdm import tqdm

    for section in sections:
        if section == "memory":
            yield list(_memory())
            continue
        try:
            with torch.inference_mode():
                candidates = BUILDERS[section](bench)
                for candidate in candidates:
                    candidate.once()  # the first call warms up
        except (ImportError, ValueError, RuntimeError) as error:  # no compiler, a type that an operator lacks
            bench.left_out[section] = str(error).strip().splitlines()[0]
            continue
        with tqdm(
            total=rounds * len(candidates), disable=not progress, unit="run", desc=section, file=sys.stderr
        ) as bar:
            yield measure(bench.reference, candidates, section, rounds, device, clock, bar, bench.pixels.dtype)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, with what every target says and whether it is kept."""
    lines = [
        "| | ms | x plain (quartiles) | FLOPs x plain | added | FLOPs added | over | peak MiB | rounds | floor "
        "| target | |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})"
        target = "" if row.target is None else f"{row.bound} {row.target:g}"
        remarks = ", ".join(text for text in (row.verdict, row.note) if text)
        cells = (
            row.name,
            _cell(row.milliseconds, ".0f"),
            ratio,
            _cell(row.flops_ratio, ".2f"),
            _cell(row.added, "+.2f"),
            _cell(row.flops_added, "+.2f"),
            _cell(row.over, ".2f"),
            _cell(row.peak_mib, ".0f"),
            _cell(row.rounds, "d"),
            _cell(row.floor, ".2f"),
            target,
            remarks,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def report(rows: Sequence[Row], left_out: dict[str, str], setting: dict[str, Any], where: dict[str, Any]) -> dict:
    """Everything, as values for JSON.

    Args:
        rows: What was measured.
        left_out: Reason for each candidate that was not.
        setting: Model, image and classes.
        where: Of `machine`.
    """
    described = [{**asdict(row), "value": row.value, "verdict": row.verdict} for row in rows]
    return {"setting": setting, "machine": where, "rows": described, "not_measured": left_out}
