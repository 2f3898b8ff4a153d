"""Fixtures of all tests: a tiny seeded CLIP with tokenizer and image processor, photos, and fresh Python processes."""

import os

# Before any Hugging Face library is imported: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # the processes share the cores
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

import copy
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from tests.faults.ledger import ledger_of

ROOT = Path(__file__).resolve().parents[1]

try:
    import hypothesis
except ImportError:  # where only the page is tested
    pass
else:
    # A busy machine, or one that counts the lines that run, is no fault of what is tested.
    slow_machine = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=slow_machine)
    hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with photos, labelled data and reference numbers that is not part of the repository."""
    folder = Path(os.environ.get("ARM_HF_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the folder {folder} (set ARM_HF_SHARED to where it is)")
    return folder


@pytest.fixture(scope="session")
def tiny_clip_config() -> CLIPConfig:
    """64 px, patch 16 (16 tokens), width 128, 12 layers, text width 64: the shape of the reference numbers."""
    return CLIPConfig(
        projection_dim=64,
        text_config={
            "vocab_size": 514,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "max_position_embeddings": 77,
            "bos_token_id": 512,
            "eos_token_id": 513,
            "pad_token_id": 513,
            "projection_dim": 64,
        },
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 12,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "projection_dim": 64,
        },
    )


@pytest.fixture(scope="session")
def _tiny_clip_template(tiny_clip_config: CLIPConfig) -> CLIPModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(copy.deepcopy(tiny_clip_config)).eval()
        # The default initialisation gives nearly equal tokens; wider weights make attention and methods differ.
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim >= 2:
                    weight.mul_(2.0)
                elif name.endswith(("bias", "class_embedding")):
                    weight.normal_(std=0.1)
    return model


@pytest.fixture
def tiny_clip(_tiny_clip_template: CLIPModel) -> CLIPModel:
    """A random CLIPModel, the same in every test and every run; each test gets its own copy."""
    return copy.deepcopy(_tiny_clip_template)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> CLIPTokenizer:
    """Byte-level CLIP tokenizer without merges: 256 bytes inside a word, 256 at its end, start, end; no download."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    # The usual byte alphabet of BPE tokenizers: bytes without a printable sign are moved above 255.
    alphabet = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    tokens = [*alphabet, *(f"{sign}</w>" for sign in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


@pytest.fixture(scope="session")
def tiny_image_processor() -> CLIPImageProcessor:
    """Shortest edge to 64 px, no crop: what dense prediction needs."""
    return CLIPImageProcessor(size={"shortest_edge": 64}, do_center_crop=False)


@pytest.fixture
def tiny_clip_folder(
    tmp_path: Path, tiny_clip: CLIPModel, tiny_tokenizer: CLIPTokenizer, tiny_image_processor: CLIPImageProcessor
) -> Path:
    """The tiny CLIP as a saved model folder, as a user would download one."""
    folder = tmp_path / "tiny-clip"
    for part in (tiny_clip, tiny_tokenizer, tiny_image_processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A photo of a cat where scikit-image is installed, else a drawn scene; 160 x 120."""
    try:
        from skimage import data
    except ImportError:
        y, x = np.mgrid[0:120, 0:160]
        scene = np.stack([255 - y, 120 + y, 40 + x], axis=-1)
        scene[(y - 70) ** 2 + (x - 80) ** 2 < 900] = (220, 140, 60)
        return Image.fromarray(scene.astype(np.uint8))
    return Image.fromarray(data.chelsea()).resize((160, 120))


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Runs code in a fresh interpreter, and returns its stdout."""

    def run(
        code: str,
        *,
        cwd: Path | None = None,
        path: Path | None = ROOT,
        env: Mapping[str, str] | None = None,
        python: str | Path = sys.executable,
        timeout: float = 300,
    ) -> str:
        """Runs `code`.

        Args:
            code: Program text; an exception in it fails the test with its traceback.
            cwd: Working directory; None takes the system's temporary one.
            path: What PYTHONPATH holds; None leaves it empty.
            env: Further environment variables.
            python: Interpreter.
            timeout: Seconds.
        """
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        clean |= {"OMP_NUM_THREADS": "1", **(env or {})}
        if path is not None:
            clean["PYTHONPATH"] = str(path)
        done = subprocess.run(
            [str(python), "-c", code],
            cwd=cwd or tempfile.gettempdir(),
            env=clean,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode != 0:
            pytest.fail(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add our own options."""
    parser.addoption("--fault-table", metavar="FILE", help="write the table of the fault suite to this Markdown file")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist sends what its fault cases led to."""
    sent = getattr(session.config, "workeroutput", None)
    if sent is not None:
        sent["faults"] = ledger_of(session.config).plain()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what a worker sent."""
    sent = getattr(node, "workeroutput", {}).get("faults")
    if sent is not None:
        ledger_of(node.config).add(sent)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what became of the fault cases, and the coverage of each room where `--cov` measured it."""
    ledger = ledger_of(config)
    if ledger.counts:
        terminalreporter.section("faults")
        for line in ledger.table():
            terminalreporter.write_line(line)
        if file := config.getoption("fault_table"):
            Path(file).write_text("\n".join(ledger.table()).rstrip() + "\n", encoding="utf-8")
    controller = getattr(config.pluginmanager.get_plugin("_cov"), "cov_controller", None)
    if getattr(controller, "cov", None) is None:
        return
    terminalreporter.section("share of the lines that the tests ran, subprocesses left out")
    for room in ("arm_hf", "modeling", "training", "hub_cards"):
        total = controller.cov.report(include=[f"{ROOT / room}/*"], ignore_errors=True, file=io.StringIO())
        terminalreporter.write_line(f"{room:<10} {total:5.1f} %")
