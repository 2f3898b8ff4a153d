"""What the benchmark counts, and a loose bound on what the methods cost."""

import json
import statistics
import time

import pytest
import torch
from torch.nn import functional as F

from arm_hf.benchmark import (
    PLAIN,
    Candidate,
    PeakMemory,
    build_clip,
    candidates,
    count_flops,
    eager_copy,
    markdown,
    measure,
)
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
    assert count_flops(lambda: left @ right) == 2 * 64 * 32 * 16
    with PeakMemory() as memory:
        for _ in range(3):
            (torch.ones(1000) + 1).view(10, 100).sum()
        assert memory.now < 1000
    assert 8000 <= memory.peak <= 8100  # two at once, whatever the number of rounds; views are no memory


def test_the_table():
    clip = build_clip("tiny")
    pixels = torch.zeros(1, 3, 64, 96)
    words = F.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    with torch.inference_mode():
        found, left_out = candidates(clip, pixels, words, ["clearclip", "proxyclip"], ("methods", "arm"))
    names = [candidate.name for candidate in found]
    assert names == [PLAIN, "clearclip", "clearclip + ARM", "clearclip + ARM without feed-forward"]
    assert "proxy_features" in left_out["proxyclip"]
    rows = measure(found, rounds=2)
    by_name = {row.name: row for row in rows}
    plain, host, refined = by_name[PLAIN], by_name["clearclip"], by_name["clearclip + ARM"]
    assert plain.ratio == plain.flops_ratio == 1.0 and host.added is None and refined.added is not None
    assert host.giga_flops < plain.giga_flops < refined.giga_flops
    assert by_name["clearclip + ARM without feed-forward"].giga_flops < refined.giga_flops
    assert all(row.low <= row.ratio <= row.high and row.peak_mib > 0 for row in rows)
    table = markdown(rows)
    assert len(table.splitlines()) == 2 + len(rows) and "| clearclip + ARM |" in table
    for wrong in ([], [Candidate("x", "methods", lambda: None)]):
        with pytest.raises(ValueError, match="needs 'plain CLIP forward, eager' first"):
            measure(wrong)


@pytest.mark.slow
def test_the_command_writes_json_and_a_table(tmp_path, run_python):
    code = f"""
import sys
from arm_hf.cli import main
sys.argv = ["arm-hf", "benchmark", "--shape", "tiny", "--height", "64", "--width", "96", "--methods", "sclip,naclip",
            "--groups", "methods,windows", "--rounds", "2", "--threads", "1", "--out", {str(tmp_path)!r}]
try:
    main()
except SystemExit as stop:
    assert stop.code == 0
"""
    printed = run_python(code)
    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert record["machine"]["threads"] == 1 and record["machine"]["dtype"] == "float32" and record["machine"]["torch"]
    assert [row["name"] for row in record["rows"][:3]] == [PLAIN, "sclip", "naclip"]
    assert "2 windows of 64, one batch" in printed
    assert (tmp_path / "benchmark.md").read_text() in printed


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
