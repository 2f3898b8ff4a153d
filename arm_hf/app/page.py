"""The page: fields on the left, overlay, score maps and comparison on the right.

`arm-hf app` opens it. As `app.py` of a Hub Space it runs as it is; there ARM_HF_MODELS (ids separated by commas) and
ARM_HF_COMPENSATION (a Stable Diffusion id) choose other models than the embedded one.
"""

from __future__ import annotations

import base64
import io
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.exceptions import ComponentProcessingError, InvalidPathError
from PIL import Image

from arm_hf import DEFAULT_MODEL
from arm_hf.app.examples import write_examples
from arm_hf.app.guard import NeededRoutesOnly, OwnFolder, require_uploads
from arm_hf.app.work import MODEL_DEFAULT, Asked, Found, Workshop, write_files
from arm_hf.colors import palette
from arm_hf.comparing import ARM_CHOICES, grid

TITLE = "Segment photos with words"
INTRO = """
# Segment photos with words
Drop a photo, type what to look for, press *Segment*. A frozen CLIP finds the words, ARM refines the map.
"""
COMPARED = ("clip", "clearclip", "naclip", "resclip")
OPACITY = 0.55


class Page(gr.Blocks):
    """Blocks that take uploads only, and say in one line what is wrong with a field."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Refuse addresses before any of Gradio's components may fetch them, and paths of other files."""
        try:
            require_uploads(inputs)
            return await super().preprocess_data(block_fn, inputs, *args, **kwargs)
        except InvalidPathError as error:
            raise _refusal("this page reads only files that were uploaded to it") from error
        except ComponentProcessingError as error:
            raise _refusal("one of the fields, or the file in the photo field, cannot be read") from error
        except ValueError as error:
            raise _refusal(str(error)) from error


def build_page(workshop: Workshop, folder: Path) -> gr.Blocks:
    """Return the page.

    Args:
        workshop: The models and what is done with them.
        folder: Where examples and results are written.
    """
    limits, examples = workshop.limits, write_examples(folder / "examples")
    with Page(title=TITLE, analytics_enabled=False, delete_cache=(600, limits.keep_seconds)) as page:
        gr.Markdown(INTRO)
        last = gr.State(None, time_to_live=limits.keep_seconds)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                photo = gr.Image(
                    value=examples[0][0],
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    label="Photo: drop, paste or choose one",
                    height=280,
                    buttons=[],
                    elem_id="photo",
                )
                labels = gr.Textbox(
                    examples[0][1],
                    label="What to look for",
                    info="Labels with commas between; synonyms after =, as in dog=puppy|hound",
                    lines=2,
                    max_length=limits.words * (limits.letters + 2),
                    elem_id="labels",
                )
                segment_button = gr.Button("Segment", variant="primary", elem_id="segment")
                with gr.Accordion("Settings", open=False):
                    background = gr.Textbox(
                        "",
                        label="Background: what is none of the labels",
                        info='Empty: the model\'s choice. "none": every pixel gets a label. 0.4: scores below it. '
                        "sky|wall: these words. 0.4|sky|wall: both.",
                        max_length=limits.words * (limits.letters + 2),
                    )
                    model = gr.Dropdown(
                        workshop.models, label="Model", visible=len(workshop.models) > 1, elem_id="model"
                    )
                    method = gr.Dropdown([MODEL_DEFAULT, *workshop.methods], label="Method", elem_id="method")
                    use_arm = gr.Checkbox(True, label="Refine with ARM, if the model has it", elem_id="arm")
                    compensation = gr.Checkbox(
                        False,
                        label="Sharpen with Stable Diffusion (slow)",
                        visible=workshop.compensation is not None,
                    )
                    size = gr.Slider(
                        0, limits.network_side, 0, step=16, label="Shorter side the network sees; 0: the model's choice"
                    )
                shown = gr.Dataset(
                    components=[gr.Image(type="filepath", render=False)],
                    samples=[[path] for path, _ in examples],
                    type="index",
                    label="Examples",
                    elem_id="examples",
                )
            with gr.Column(scale=5, min_width=480), gr.Tabs():
                with gr.Tab("Overlay"):
                    viewer = _viewer()
                    with gr.Row():
                        opacity = gr.Slider(0, 1, OPACITY, step=0.05, label="Opacity", elem_id="opacity")
                        contours = gr.Checkbox(False, label="Contours only", elem_id="contours")
                        safe = gr.Checkbox(False, label="Colour-blind-safe colours", elem_id="safe")
                    facts = gr.Markdown(elem_id="facts")
                    with gr.Row():
                        save_picture = gr.DownloadButton("Picture (PNG)", interactive=False, elem_id="save-picture")
                        save_labels = gr.DownloadButton("Label map (PNG)", interactive=False, elem_id="save-labels")
                        save_json = gr.DownloadButton("Legend (JSON)", interactive=False, elem_id="save-json")
                with gr.Tab("Score maps"):
                    gr.Markdown("How sure the model is of each label, from dark violet (0) to yellow (1).")
                    score_maps = _sheet("scores")
                with gr.Tab("Compare methods"):
                    methods = gr.CheckboxGroup(
                        workshop.methods,
                        value=[name for name in COMPARED if name in workshop.methods],
                        label="Methods; the photo passes the network once for all of them",
                        elem_id="methods",
                    )
                    with gr.Row():
                        arm = gr.Radio(
                            list(ARM_CHOICES), value="off", label="ARM", visible=workshop.first_has_arm, elem_id="arms"
                        )
                        compare_button = gr.Button("Compare", variant="primary", elem_id="compare")
                    compared = _sheet("compared")
                    times = gr.Markdown(elem_id="times")

        shown.click(lambda index: examples[index], shown, [photo, labels], queue=False, api_visibility="private")
        asked = [photo, labels, background, model, method, use_arm, compensation, size]
        style = [opacity, contours, safe]
        files = [save_picture, save_labels, save_json]
        segment_button.click(
            _answering(lambda *fields: _segment(workshop, folder, Asked(*fields[:8]), *fields[8:])),
            [*asked, *style],
            [viewer, facts, score_maps, *files, last],
            api_name="segment",
            concurrency_id="model",
            show_progress_on=viewer,
        )
        compare_button.click(
            _answering(lambda *fields: _compare(workshop, Asked(*fields[:8]), *fields[8:])),
            [*asked, methods, arm, safe],
            [compared, times],
            api_name="compare",
            concurrency_id="model",
            show_progress_on=compared,
        )
        view = "(opacity, contours, safe) => { window.armhfView?.(opacity, contours, safe); return []; }"
        for control, changed in ((opacity, opacity.input), (contours, contours.input), (safe, safe.input)):
            changed(None, style, None, js=view, queue=False)
            settled = opacity.release if control is opacity else changed
            settled(
                _answering(lambda *fields: _draw_again(folder, *fields)),
                [last, *style],
                [save_picture, save_labels],
                api_visibility="private",
                concurrency_id="drawing",
                concurrency_limit=2,
                show_progress="hidden",
            )
    page.queue(max_size=limits.queue, default_concurrency_limit=1, api_open=False)
    return page


def serve(workshop: Workshop, host: str | None = None, port: int | None = None, open_browser: bool = False) -> None:
    """Show the page until the process is told to stop (SIGINT, SIGTERM), and then end the process.

    Args:
        workshop: The models and what is done with them.
        host: Address to listen at; by default GRADIO_SERVER_NAME or this machine alone.
        port: Port; by default GRADIO_SERVER_PORT or the first free one from 7860.
        open_browser: Open the page in the browser of this machine.

    Raises:
        OSError: The port is taken.
    """
    from starlette.middleware import Middleware

    limits = workshop.limits
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder goes
    with OwnFolder(limits.disk_megabytes, limits.keep_seconds) as folder:
        page = build_page(workshop, folder.path)
        folder.keep_present()
        page.launch(
            server_name=host,
            server_port=port,
            inbrowser=open_browser,
            share=False,
            prevent_thread_lock=True,
            max_file_size=limits.file_megabytes * 10**6,
            state_session_capacity=limits.sessions,
            allowed_paths=[],
            enable_monitoring=False,
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            footer_links=["gradio"],
            theme=_theme(),
            app_kwargs={"middleware": [Middleware(NeededRoutesOnly, file_megabytes=limits.file_megabytes)]},
        )
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()
        page.close(verbose=False)
    print("The page is closed, and the files of its visitors are gone.", flush=True)
    os._exit(0)  # visitors' open connections would keep the interpreter from ending


def main() -> None:
    """Run as a Hub Space does: settings come from the environment."""
    models = [name.strip() for name in os.environ.get("ARM_HF_MODELS", DEFAULT_MODEL).split(",") if name.strip()]
    serve(Workshop(models, os.environ.get("ARM_HF_COMPENSATION") or None))


def _refusal(message: str) -> gr.Error:
    """A message for the visitor, in one line; the log has no use for it."""
    return gr.Error(" ".join(message.split()), duration=15, print_exception=False)


def _answering(work: Callable[..., Any]) -> Callable[..., Any]:
    """Turn what a visitor can mend into one message on the page; of anything else tell the log, not the visitor."""

    def answer(*fields: Any) -> Any:
        try:
            return work(*fields)
        except (ValueError, ImportError) as error:
            raise _refusal(str(error)) from error
        except MemoryError as error:
            raise _refusal("this took more memory than there is; try fewer labels or a smaller photo") from error
        except Exception as error:
            traceback.print_exc()
            raise _refusal("something went wrong on the server; its log says what") from error

    return answer


def _segment(
    workshop: Workshop, folder: Path, asked: Asked, alpha: float, contours: bool, safe: bool
) -> tuple[Any, ...]:
    found = workshop.segment(asked)
    results = Path(tempfile.mkdtemp(dir=folder / "files"))
    paths = write_files(found, results, alpha, contours, _colors(safe))
    downloads = [gr.DownloadButton(value=path, interactive=True) for path in paths]
    return (_view(found), "  \n".join(found.facts), found.score_maps, *downloads, found)


def _draw_again(folder: Path, found: Found | None, alpha: float, contours: bool, safe: bool) -> tuple[Any, ...]:
    if found is None:
        return gr.skip(), gr.skip()
    results = Path(tempfile.mkdtemp(dir=folder / "files"))
    picture, labels, _ = write_files(found, results, alpha, contours, _colors(safe))
    return gr.DownloadButton(value=picture), gr.DownloadButton(value=labels)


def _compare(workshop: Workshop, asked: Asked, methods: Sequence[str], arm: str, safe: bool) -> tuple[Image.Image, str]:
    photo, comparison = workshop.compare(asked, methods, arm)
    lines = ["| method | ms after the shared pass |", "|:--|--:|"]
    lines += [f"| {result.name} | {1000 * result.seconds:.0f} |" for result in comparison.results]
    lines.append(f"\nShared pass: {1000 * comparison.trunk_seconds:.0f} ms.")
    lines += [f"\nLeft out {name}: {reason}" for name, reason in comparison.left_out.items()]
    return grid(photo, comparison, colors=_colors(safe)), "\n".join(lines)


def _colors(safe: bool) -> str:
    return "colorblind" if safe else "vivid"


def _view(found: Found) -> dict[str, Any]:
    """What the viewer's script reads."""
    vivid, colorblind = (palette(found.id2label, kind) for kind in ("vivid", "colorblind"))
    # Steps of a twentieth in the score: a photo's worth of finer ones would be most of what is sent.
    score = (np.rint(found.confidence / 12.75) * 12.75).astype(np.uint8)
    pixels = np.stack([found.semantic_map, score, np.zeros_like(score)], axis=-1)
    return {
        "photo": _data_address(found.photo, "JPEG", quality=88),
        "labels": _data_address(Image.fromarray(pixels), "PNG"),
        "classes": [
            {
                "id": segment.id,
                "name": segment.label,
                "share": segment.share,
                "score": mean,
                "vivid": _hex(vivid[segment.id]),
                "colorblind": _hex(colorblind[segment.id]),
            }
            for segment, mean in zip(found.segments, found.scores, strict=True)
        ],
    }


def _data_address(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _hex(color: tuple[int, int, int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in color)


def _viewer() -> gr.HTML:
    text = {
        kind: resources.files("arm_hf").joinpath("assets", "app", f"viewer.{kind}").read_text(encoding="utf-8")
        for kind in ("html", "css", "js")
    }
    return gr.HTML(
        value={},
        html_template=text["html"],
        css_template=text["css"],
        js_on_load=text["js"],
        apply_default_css=False,
        elem_id="viewer",
    )


def _sheet(name: str) -> gr.Image:
    return gr.Image(
        type="pil", format="webp", show_label=False, interactive=False, buttons=["download", "fullscreen"], elem_id=name
    )


def _theme() -> gr.Theme:
    """Fonts of the visitor's machine: nothing is loaded from elsewhere."""
    return gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


if __name__ == "__main__":
    main()
