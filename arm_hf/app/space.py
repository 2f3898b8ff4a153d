"""The folder of a Hub Space that shows the page: the page's own file, what it needs, and the Space's header."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path

from arm_hf import DEFAULT_MODEL, __version__
from arm_hf.app import require_gradio
from arm_hf.folders import atomic_path

_HEADER = """---
title: Segment photos with words
colorFrom: green
colorTo: indigo
sdk: gradio
sdk_version: {gradio}
app_file: app.py
pinned: false
license: apache-2.0
{models}---

Open-vocabulary segmentation with arm_hf. The Space's variables choose other models than the embedded one:
`ARM_HF_MODELS` (hub ids separated by commas){chosen} and `ARM_HF_COMPENSATION` (a Stable Diffusion id).

While arm_hf is not in the package index, put its wheel (`make wheel`) beside this file and name it in
`requirements.txt`: `./{wheel}[app]`.
"""


def write_space(
    folder: str | Path, models: Sequence[str] = (DEFAULT_MODEL,), compensation: str | None = None
) -> list[str]:
    """Write `app.py`, `requirements.txt` and `README.md`; return their paths.

    Args:
        folder: Where to; it is made if missing.
        models: Hub ids that the Space is to offer; folders of this machine are not there.
        compensation: Hub id of a Stable Diffusion checkpoint, or None.

    Raises:
        ValueError: One of the files is there already, or a model is a folder of this machine.
        ImportError: gradio is not installed: its version belongs into the header.
    """
    folder = Path(folder).expanduser()
    for name in (*models, *([compensation] if compensation else [])):
        if Path(name).expanduser().exists():
            raise ValueError(f"{name!r} is a folder of this machine, which a Space does not have; name a hub id")
    require_gradio()
    ids = [name for name in models if name != DEFAULT_MODEL]
    chosen = ",".join(models)
    page = resources.files("arm_hf").joinpath("app", "page.py").read_text(encoding="utf-8")
    settings = {"ARM_HF_MODELS": chosen if ids else "", "ARM_HF_COMPENSATION": compensation or ""}
    texts = {
        "app.py": _with_defaults(page, settings),
        "requirements.txt": f"arm_hf[app]=={__version__}\n",
        "README.md": _HEADER.format(
            gradio=version("gradio"),
            models=f"models: {json.dumps(ids)}\n" if ids else "",
            chosen=f", here `{chosen}`" if ids else "",
            wheel=f"arm_hf-{__version__}-py3-none-any.whl",
        ),
    }
    there = [name for name in texts if (folder / name).exists()]
    if there:
        raise ValueError(f"{str(folder / there[0])!r} is there already; choose another folder")
    for name, text in texts.items():
        with atomic_path(folder / name) as path:
            path.write_text(text, encoding="utf-8")
    return [str(folder / name) for name in texts]


def _with_defaults(page: str, settings: dict[str, str]) -> str:
    """The page's file, with the choices that differ from the page's own as defaults of the environment."""
    lines = [f"    os.environ.setdefault({name!r}, {value!r})\n" for name, value in settings.items() if value]
    head, start, tail = page.rpartition('if __name__ == "__main__":\n')
    return head + start + "".join(lines) + tail
