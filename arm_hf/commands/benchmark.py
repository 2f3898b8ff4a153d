"""`arm-hf benchmark`: time, memory and operations of every method."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import one_line_errors, quiet_libraries


def benchmark(
    shape: Annotated[
        str, typer.Option(help="Backbone with random weights: vit-b-32, vit-b-16, vit-l-14, vit-l-14-336, vit-h-14.")
    ] = "vit-b-16",
    model: Annotated[
        str | None, typer.Option(help="Measure this model in place of a shape: arm-clip-mini, a folder, or a hub id.")
    ] = None,
    methods: Annotated[str, typer.Option(help='"all", or methods separated by commas.')] = "all",
    sections: Annotated[
        str,
        typer.Option(
            help="What to measure, separated by commas: methods, arm, windows, pamr, together, memory; and, which all "
            "leaves out, bf16, compile."
        ),
    ] = "all",
    height: Annotated[int, typer.Option(help="Height of the images in pixels.")] = 336,
    width: Annotated[int, typer.Option(help="Width of the images in pixels.")] = 448,
    batch: Annotated[int, typer.Option(help="Images per call.")] = 1,
    words: Annotated[int, typer.Option(help="Number of classes.")] = 21,
    rounds: Annotated[
        int,
        typer.Option(
            help="Times that each candidate is run, each after a plain forward; thrice that close to its target."
        ),
    ] = 7,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="Threads of torch on the CPU.  [default: torch's own]")] = None,
    clock: Annotated[
        str, typer.Option(help='"wall", or "cpu" to count the time of the processor alone, with --threads 1.')
    ] = "wall",
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder for benchmark.json and benchmark.md, replaced after every section."),
    ] = None,
) -> None:
    """Measure every method, with and without ARM, against a plain CLIP image forward in the same run."""
    with one_line_errors():
        import json
        import sys
        from pathlib import Path

        from arm_hf.comparing import parse_methods
        from arm_hf.folders import atomic_path

        for name, value in {"height": height, "width": width, "batch": batch, "words": words, "rounds": rounds}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        quiet_libraries()
        import torch

        from arm_hf import benchmark as bench
        from arm_hf.measuring import CLOCKS, machine, torch_threads

        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"unknown dtype {dtype!r}; choose float32, bfloat16 or float16")
        if clock not in CLOCKS or (clock == "cpu" and (threads != 1 or device != "cpu")):
            raise ValueError(f"clock must be wall, or cpu with --threads 1 on the CPU; got {clock!r}")
        chosen = [name.strip() for name in sections.split(",")]
        if chosen == ["all"]:
            chosen = [name for name in bench.SECTIONS if name not in bench.OPT_IN]
        if wrong := [name for name in chosen if name not in bench.SECTIONS]:
            raise ValueError(f"unknown section {wrong[0]!r}; choose from {', '.join(bench.SECTIONS)}, or all")
        names = None if methods == "all" else parse_methods(methods)
        kind = getattr(torch, dtype)
        if model is None:
            clip, arm = bench.build_clip(shape, dtype=kind, device=device), None
        else:
            from arm_hf.segmenting import load_pipeline

            loaded = load_pipeline(model, device=device, dtype=dtype).model
            clip, arm = (loaded.clip, loaded) if hasattr(loaded, "arm") else (loaded, None)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(batch, 3, height, width, generator=generator).to(device, kind)
        queries = torch.randn(words, clip.config.projection_dim, generator=generator)
        queries = torch.nn.functional.normalize(queries, dim=-1).to(device, kind)

        where = machine(device, kind, threads)
        setting = {
            "model": model or f"{shape}, random weights",
            "image": f"{batch} x {height} x {width}",
            "classes": words,
            "rounds": rounds,
            "clock": clock,
        }
        facts = ", ".join(f"{name} {value}" for name, value in {**setting, **where}.items())
        typer.echo(f"{facts}\n")
        rows: list = []
        with torch_threads(threads):
            work = bench.Bench(clip, pixels, queries, names, arm)
            if not work.methods:
                raise ValueError(f"none of the methods runs here: {'; '.join(work.left_out.values())}")
            for measured in bench.run_sections(work, chosen, rounds, device, clock, sys.stderr.isatty()):
                rows += measured
                typer.echo(f"{measured[0].section}\n\n{bench.markdown(measured)}\n")
                if out is not None:
                    record = bench.report(rows, work.left_out, setting, where)
                    with atomic_path(Path(out) / "benchmark.json") as path:
                        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
                    with atomic_path(Path(out) / "benchmark.md") as path:
                        path.write_text(f"{facts}\n\n{bench.markdown(rows)}\n", encoding="utf-8")
        for name, reason in work.left_out.items():
            typer.echo(f"not measured: {name}: {reason}")
        verdicts = [row.verdict for row in rows if row.verdict]
        counts = ", ".join(f"{verdicts.count(name)} {name}" for name in ("met", "floor", "missed"))
        typer.echo(f"targets: {counts} (floor: bare operations take more than the target allows)")
        if out is not None:
            typer.echo(f"written to {out}")
