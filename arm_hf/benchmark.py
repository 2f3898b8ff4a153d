"""Time of every method, and of ARM on top, as a multiple of a plain CLIP image forward.

    python -m arm_hf.benchmark --size 336 --batch 1 --words 21 --out bench_output

All candidates are timed in turn, round after round, so that a machine that slows down slows all of them; the table
gives medians, and ratios of times of the same round. Text is encoded beforehand and not counted: class embeddings are
computed once per set of words. What is timed ends at the scores on the model's grid; the step to pixels is the same
for all and depends on the size of the picture.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import arm_hf

PLAIN = "plain CLIP forward"


def load(model: str, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The `CLIPModel` of a folder or hub id, and the `ARMModel` around it or None."""
    from transformers import AutoConfig, AutoModel

    path = arm_hf.resolve_model(model)
    loaded = AutoModel.from_pretrained(path, dtype=dtype).to(device).eval()
    if AutoConfig.from_pretrained(path).model_type == "arm":
        return loaded.clip, loaded
    return loaded, None


def candidates(
    clip: Any, arm: Any, pixels: Tensor, words: Tensor, methods: Sequence[str]
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """What is timed, by name, and what cannot be timed here, with the reason."""
    dense = arm_hf.DenseCLIP(clip)
    runs: dict[str, Callable[[], Any]] = {
        PLAIN: lambda: clip.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True)
    }
    for name in methods:
        runs[name] = lambda name=name: dense.query_maps(pixels, words, name)  # type: ignore[misc]
    if arm is not None:
        runs[f"{arm.config.method} + ARM"] = lambda: arm(pixel_values=pixels, class_embeddings=words)

    left_out = {}
    for name, run in list(runs.items()):
        try:
            run()  # the first call also warms up
        except (ImportError, TypeError, ValueError) as error:  # a method that wants other models or words
            left_out[name] = str(error)
            del runs[name]
    return runs, left_out


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each candidate in each round."""

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summarise(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Median milliseconds and median ratio to the plain forward of the same round."""
    plain = seconds[PLAIN]
    return [
        {
            "name": name,
            "median_ms": round(1e3 * statistics.median(times), 3),
            "ratio": round(statistics.median(t / p for t, p in zip(times, plain, strict=True)), 3),
        }
        for name, times in seconds.items()
    ]


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m arm_hf.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=arm_hf.DEFAULT_MODEL, help="folder, hub id, or the embedded model")
    parser.add_argument("--methods", nargs="*", help="names of methods (default: all)")
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels")
    parser.add_argument("--batch", type=int, default=1, help="images per call")
    parser.add_argument("--words", type=int, default=21, help="number of classes")
    parser.add_argument("--rounds", type=int, default=15, help="times that each candidate is run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU (default: torch's own)")
    parser.add_argument("--out", type=Path, help="folder for methods.json")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    clip, arm = load(arguments.model, arguments.device, dtype)
    pixels = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device=arguments.device, dtype=dtype)
    words = torch.randn(arguments.words, clip.config.projection_dim, device=arguments.device, dtype=dtype)
    words = torch.nn.functional.normalize(words, dim=-1)

    with torch.inference_mode():
        methods = arguments.methods or arm_hf.list_methods()
        runs, left_out = candidates(clip, arm, pixels, words, methods)
        table = summarise(interleaved(runs, arguments.rounds, arguments.device))

    print(f"{'':28s} {'median ms':>10s} {'x plain':>8s}")
    for row in table:
        print(f"{row['name']:28s} {row['median_ms']:10.1f} {row['ratio']:8.2f}")
    for name, reason in left_out.items():
        print(f"{name:28s} not timed: {reason}")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        setting = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.machine()}
        report = {"setting": setting, "machine": machine, "methods": table, "not_timed": left_out}
        path = arguments.out / "methods.json"
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"\nWritten: {path}")


if __name__ == "__main__":
    main()
