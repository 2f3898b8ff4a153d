"""What the benchmark counts and says, and a loose bound on what the methods cost."""

import itertools
import json
import statistics
import time

import pytest
import torch
from torch.nn import functional as F

from arm_hf import benchmark, measuring
from arm_hf.benchmark import Bench, build_clip, eager_copy, markdown, report, run_sections
from arm_hf.floors import Bare, Work, count_work
from arm_hf.measuring import Candidate, PeakMemory, Row, measure, resident_mib, run_in_child
from arm_hf.modeling.dense_clip import DenseCLIP
from arm_hf.modeling.modeling_arm import ARMModel


def test_the_reference_is_the_same_model_with_eager_attention():
    clip = build_clip("tiny")
    eager = eager_copy(clip)
    assert (eager.config.vision_config._attn_implementation, clip.config.vision_config._attn_implementation) == (
        "eager",
        "sdpa",
    )
    assert all(a is b for a, b in zip(eager.parameters(), clip.parameters(), strict=True))
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = clip.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
        found = eager.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_operations_and_memory_are_counted():
    left, right = torch.ones(64, 32), torch.ones(32, 16)
    assert count_work(lambda: left @ right) == Work(2 * 64 * 32 * 16, 0, 0)
    with PeakMemory() as memory:
        for _ in range(3):
            (torch.ones(1000) + 1).view(10, 100).sum()
        assert memory.now < 1000
    assert 8000 <= memory.peak <= 8100  # two at once, whatever the number of rounds; views are no memory


def test_growth_of_a_process_of_its_own():
    assert resident_mib(peak=True) >= resident_mib() > 10
    code = (
        "from arm_hf import measuring as m; before = m.resident_mib(); "
        "big = bytearray(b'x') * (64 << 20); del big; print(m.resident_mib(peak=True) - before)"
    )
    assert 60 < run_in_child(code) < 80
    with pytest.raises(RuntimeError, match="ValueError: no"):
        run_in_child("raise ValueError('no')")


def test_work_is_counted_and_takes_at_least_so_long():
    scores, states = torch.zeros(2, 3, 5), torch.ones(2, 4, 5, 8)
    work = count_work(lambda: (scores.softmax(-1), scores.exp(), scores.sigmoid(), scores @ torch.ones(2, 5, 7)))
    assert work == Work(0, 2 * 2 * 3 * 5 * 7, 2 * 2 * 3 * 5)
    with torch.inference_mode():
        work = count_work(lambda: F.scaled_dot_product_attention(states, states, states))
    assert work == Work(0, 2 * 4 * 2 * 2 * 5 * 5 * 8, 2 * 4 * 5 * 5)
    assert Work(7, 5, 3) - Work(3, 4, 1) == Work(4, 1, 2) and Work(7, 5, 3).flops == 12
    bare = Bare("cpu", torch.float32)
    clocked = iter([3.0, 2.0, 4.0, 0.9, 0.8, 0.7, 0.2, 0.1, 0.3])  # of three calls the fastest counts
    least = bare.speed(lambda run: run() or next(clocked))
    with torch.inference_mode():
        for run, expected in ((bare.multiply, 2.0), (bare.attend, 0.7), (bare.exponentiate, 0.1)):
            assert least(count_work(run)) == pytest.approx(expected)


def test_floors_follow_what_the_target_bounds():
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))

    def times(count):
        return lambda: [a @ b for _ in range(count)]

    reference, host, run = times(4), times(2), times(3)
    shown = [
        Candidate("ratio", run, target=1.0),
        Candidate("added", run, host, 1.0, "added"),
        Candidate("over", run, host, 1.0, "over"),
        Candidate("without a target", run),
    ]
    ratio, added, over, free = measure(reference, shown, "x", rounds=5)
    assert free.floor is None and free.verdict == ""
    for row in (ratio, over):
        assert 0 < row.floor < 1.5 * row.value  # the same kernel: near it, and not far above whatever the noise
    assert 0 < added.floor < ratio.floor < over.floor


def test_what_is_needed_is_a_floor_too():
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    run = lambda: a @ b  # noqa: E731
    needed = Candidate("needed", run, target=1.0, needed=lambda: [run() for _ in range(8)])
    bare, held = measure(run, [Candidate("bare", run, target=1.0), needed], "x", rounds=5)
    assert held.floor > 3 > 1.5 > bare.floor


def test_what_is_close_to_its_target_is_measured_more_often(monkeypatch):
    clock = itertools.count()
    monkeypatch.setitem(measuring.CLOCKS, "steps", lambda: float(next(clock)))  # every run takes a second
    shown = [Candidate(str(target), lambda: None, target=target) for target in (1.05, 0.95, 2.0, 0.5, None)]
    rows = measure(lambda: None, shown, "x", rounds=3, clock="steps")
    assert [row.ratio for row in rows] == [1.0] * 5
    assert [row.verdict for row in rows] == ["met", "missed", "met", "missed", ""]
    assert [row.rounds for row in rows] == [9, 9, 3, 3, 3]


def test_a_candidate_may_go_on_from_its_host():
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    seen = []

    def host():
        return [a @ b for _ in range(20)]

    def rest(found):
        seen.append(len(found))
        return found[0] @ b

    (row,) = measure(host, [Candidate("x", rest, host, 1.0, "added", continues=True)], "x", rounds=5)
    assert set(seen) == {20} and row.flops_added == 0.05 and row.flops_ratio == 1.05
    assert 0 < row.added < 0.5 < row.ratio and row.over > 1


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (Row("a", "x", ratio=1.0, floor=1.2, target=1.0), "met"),
        (Row("a", "x", ratio=1.1, flops_ratio=1.2, floor=0.9, target=1.0), "missed"),
        (Row("a", "x", ratio=1.3, flops_ratio=0.9, floor=1.2, target=1.0), "floor"),
        (Row("a", "x", ratio=3.0, added=0.1, target=0.2, bound="added"), "met"),
        (Row("a", "x", ratio=0.1, added=0.4, floor=0.3, target=0.2, bound="added"), "floor"),
        (Row("a", "x", ratio=0.1, over=1.4, floor=1.0, target=1.0, bound="over"), "missed"),
        (Row("a", "x", peak_mib=5.0, target=4.0, bound="mib"), "missed"),
        (Row("a", "x", ratio=9.0), ""),
    ],
)
def test_verdicts(row, verdict):
    assert row.verdict == verdict


def test_sections_and_their_tables():
    pixels = torch.zeros(1, 3, 64, 96)
    words = F.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    bench = Bench(build_clip("tiny"), pixels, words, ["clearclip", "proxyclip"])
    assert bench.methods == ["clearclip"] and "proxy_features" in bench.left_out["proxyclip"]
    methods, arm, windows, together = run_sections(bench, ["methods", "arm", "windows", "together"], rounds=2)
    plain, _, host = methods
    refined, light = arm
    assert [row.name for row in arm] == ["clearclip + ARM", "clearclip + ARM without feed-forward"]
    assert plain.flops_ratio == 1.0 and host.added is None and host.flops_ratio < 1 and host.bound == "ratio"
    assert refined.bound == "added" and refined.added is not None and refined.flops_added > light.flops_added > 0
    assert windows[0].bound == "over" and windows[0].over > 0 and windows[0].flops_over == 1.0
    assert [row.note for row in together] == ["1 methods, 1 trunk passes"] * 2
    assert all(row.low <= row.ratio <= row.high and row.least <= row.ratio and row.peak_mib > 0 for row in methods)
    table = markdown([*methods, *arm])
    assert len(table.splitlines()) == 2 + len(methods) + len(arm) and "| clearclip + ARM |" in table
    record = json.loads(json.dumps(report(arm, bench.left_out, {}, {})))
    assert record["rows"][0]["value"] == refined.added and record["rows"][0]["verdict"] == refined.verdict
    with pytest.raises(ValueError, match="at least one round and a clock of wall, cpu"):
        measure(bench.reference, [Candidate("x", bench.reference)], "methods", rounds=0)


def test_what_cannot_be_measured_is_named_with_the_reason(monkeypatch):
    bench = Bench(build_clip("tiny"), torch.zeros(1, 3, 64, 96), torch.eye(3, 32), ["clip"])
    monkeypatch.setattr(benchmark.shutil, "which", lambda name: None)
    assert list(run_sections(bench, ["compile"], rounds=1)) == []
    assert "needs a C++ compiler" in bench.left_out["compile"]


@pytest.mark.parametrize("count", [171, 847])
@pytest.mark.slow
def test_many_classes_at_a_large_size_stay_within_memory(count):
    assert run_in_child(f"from arm_hf.benchmark import decision_peak; print(decision_peak({count}))") < 2048


@pytest.mark.slow
def test_the_command_writes_json_and_a_table(tmp_path, run_python):
    code = f"""
import sys
from arm_hf.cli import main
sys.argv = ["arm-hf", "benchmark", "--shape", "tiny", "--height", "64", "--width", "96", "--methods", "sclip,naclip",
            "--sections", "methods,windows,bf16", "--rounds", "2", "--threads", "1", "--clock", "cpu",
            "--out", {str(tmp_path)!r}]
try:
    main()
except SystemExit as stop:
    assert stop.code == 0
"""
    printed = run_python(code)
    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert record["machine"]["threads"] == 1 and record["machine"]["dtype"] == "float32" and record["machine"]["torch"]
    assert record["setting"]["clock"] == "cpu"
    rows = {row["name"]: row for row in record["rows"]}
    assert {"sclip", "naclip", "sclip, 2 windows of 64, one batch"} <= set(rows)
    assert "of the patches keep their label" in rows["sclip in bfloat16"]["note"]
    lines = (tmp_path / "benchmark.md").read_text().splitlines()
    assert set(lines) <= set(printed.splitlines()) and "targets: " in printed


@pytest.mark.slow
def test_no_method_became_much_slower():
    """Ratios to a plain forward of a CLIP of medium size, with ample room: noise passes, a lost shortcut does not."""
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(vision_config={**vision, "patch_size": 16}, text_config={**text, "vocab_size": 64})
    torch.manual_seed(0)
    clip = CLIPModel(config).eval()
    eager, dense, arm = eager_copy(clip), DenseCLIP(clip), ARMModel.from_clip(clip).eval()
    pixels, words = torch.randn(1, 3, 336, 448), F.normalize(torch.randn(21, 512), dim=-1)
    bounds = {"clearclip": 1.3, "sclip": 1.3, "naclip": 1.4, "clip_surgery": 1.5, "gem": 2.2, "cliper": 2.2}
    runs = {name: lambda name=name: dense.query_maps(pixels, words, name) for name in bounds}
    runs["arm"] = lambda: arm.query_maps(pixels, words, "clearclip")
    bounds["arm"] = 2.2

    def seconds(run):
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    def plain():
        return eager.get_image_features(pixels, interpolate_pos_encoding=True)

    ratios = {name: [] for name in runs}
    with torch.inference_mode():
        for _ in range(6):
            for name, run in runs.items():
                reference = seconds(plain)
                ratios[name].append(seconds(run) / reference)
    medians = {name: statistics.median(values[1:]) for name, values in ratios.items()}
    too_slow = {name: round(value, 2) for name, value in medians.items() if value > bounds[name]}
    assert not too_slow, f"times a plain forward, bounds are {bounds}"
