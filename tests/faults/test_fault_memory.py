"""Memory: large pictures and many classes within a bound, and one line where a bound is too narrow.

The bound is RLIMIT_DATA, which counts all memory that a process may write to on its own. RLIMIT_AS would count torch's
libraries and the mapped weights too, some gigabytes that are never in memory.
"""

import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts so on Linux")]

GROUP = "memory"
GB = 10**9
CAP = 2.5 * GB


def run(environment: dict, arguments: list, cap: float | None = None) -> tuple[int, str, float]:
    """The command in a process of its own: exit code, error output, and the most memory it had, in bytes."""

    def limit() -> None:
        if cap is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (int(cap), int(cap)))

    process = subprocess.Popen(
        [sys.executable, "-m", "arm_hf.cli", *map(str, arguments)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))
    reader.start()
    _, status, usage = os.wait4(process.pid, 0)
    reader.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, "".join(errors), 1024.0 * usage.ru_maxrss


@pytest.fixture
def large(tmp_path) -> Path:
    """12 megapixels of coloured patches."""
    patches = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(patches).resize((4000, 3000), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg")
    return tmp_path / "large.jpg"


def test_twelve_megapixels_and_171_classes(faults, environment, large, tmp_path):
    """With the embedded model and default options."""
    arguments = ["segment", large, "--labels-from", "coco_stuff171", "--out", tmp_path / "out"]
    with faults.case(GROUP, "12 megapixels, 171 classes") as case:
        code, errors, peak = run({**environment, "CUDA_VISIBLE_DEVICES": ""}, arguments, CAP)
        assert code == 0, errors
        assert peak < CAP, peak
        case.whole(tmp_path / "out")
        with Image.open(tmp_path / "out" / "large.png") as labels:
            assert labels.size == (4000, 3000)
        found = len(json.loads((tmp_path / "out" / "large.json").read_text())["segments"])
        faults.note(f"4000 x 3000 pixels, 171 classes ({found} occur): at most {peak / GB:.2f} GB in memory")
        case.right()


def test_every_class_occurs(faults, run_python):
    """What the command asks for holds no masks: those of 171 classes on 12 megapixels would be 2 GB."""
    code = """
import resource, numpy as np
from arm_hf.modeling.pipeline_arm import describe_segments
labels = (np.arange(3000 * 4000, dtype=np.int32) % 171).reshape(3000, 4000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
names = {index: str(index) for index in range(171)}
found = describe_segments(labels, np.ones(labels.shape, np.float32), names, masks=False)
assert len(found) == 171 and sum(each["pixels"] for each in found) == labels.size
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
    with faults.case(GROUP, "12 megapixels, every one of 171 classes occurs") as case:
        more = int(run_python(code, env={"CUDA_VISIBLE_DEVICES": ""}))
        faults.note(f"descriptions of 171 classes on 12 megapixels: {more / GB:.2f} GB more")
        assert more < 1 * GB, more
        case.right()


@pytest.fixture(scope="module")
def libraries(run_python) -> int:
    """Bytes that the libraries alone count for, before any work."""
    code = """
import arm_hf.evaluating, arm_hf.loading, arm_hf.segmenting, arm_hf.modeling.modeling_arm
from transformers import CLIPImageProcessor, CLIPTokenizer, pipeline
(line,) = [line for line in open("/proc/self/status") if line.startswith("VmData:")]
print(1024 * int(line.split()[1]))
"""
    return int(run_python(code, env={"CUDA_VISIBLE_DEVICES": ""}))


@pytest.mark.parametrize("more", [0.1, 0.25])
def test_a_bound_that_is_too_narrow(faults, environment, large, models, tmp_path, libraries, more):
    arguments = ["segment", large, "--labels", "cat,dog,sky", "--model", models / "full", "--out", tmp_path / "out"]
    with faults.case(GROUP, f"12 megapixels in {more} GB beside the libraries") as case:
        cap = libraries + more * GB
        code, errors, _ = run({**environment, "CUDA_VISIBLE_DEVICES": ""}, arguments, cap)
        assert "Traceback" not in errors, errors
        if (tmp_path / "out").exists():
            case.whole(tmp_path / "out")
        if code == 0:
            case.right()
        else:
            assert code == 1, errors
            case.line(errors)
