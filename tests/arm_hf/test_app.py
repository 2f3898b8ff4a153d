"""The page's limits, folder and requests; and the page itself in a real server process, as a client sees it."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arm_hf.app.guard import NeededRoutesOnly, OwnFolder, require_uploads, sweep
from arm_hf.app.limits import Limits, read_background, read_labels, read_photo
from arm_hf.app.work import Asked, Workshop, write_files

START_SECONDS = 300


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, _tiny_clip_template, tiny_tokenizer, tiny_image_processor) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    for part in (_tiny_clip_template, tiny_tokenizer, tiny_image_processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def workshop(model_folder) -> Workshop:
    return Workshop([str(model_folder)], device="cpu")


@pytest.fixture(scope="module")
def photo_file(tmp_path_factory, photo) -> Path:
    path = tmp_path_factory.mktemp("photos") / "cat.jpg"
    photo.save(path)
    return path


class TestLimits:
    limits = Limits(labels=3, words=5, letters=8, longest_side=100, megapixels=1)

    def test_labels(self):
        assert [label.name for label in read_labels(" cat, dog=puppy,", self.limits)] == ["cat", "dog"]
        for text, message in [
            ("", "type what to look for"),
            (None, "type what to look for"),
            (" , ,", "label"),
            ("a, b, c, d", "4 labels"),
            ("a=b|c|d, e=f|g", "7 words"),
            ("x" * 9, "9 letters"),
            ("x" * 1000, "1000 letters"),
        ]:
            with pytest.raises(ValueError, match=message):
                read_labels(text, self.limits)

    def test_background(self):
        labels = read_labels("cat, dog", self.limits)
        assert read_background("  ", labels, self.limits) is None
        assert read_background("0.3|sky", labels, self.limits).words == ("sky",)
        for text, message in [("1.5", "between 0 and 1"), ("a|b|c|d", "6 words"), ("y" * 9, "9 letters")]:
            with pytest.raises(ValueError, match=message):
                read_background(text, labels, self.limits)

    def test_photos_are_reduced_and_the_page_says_so(self, tmp_path):
        path = tmp_path / "large.png"
        Image.new("RGB", (400, 200)).save(path)
        photo, note = read_photo(str(path), self.limits)
        assert photo.size == (100, 50) and "400 × 200" in note
        Image.new("RGB", (80, 60)).save(path)
        assert read_photo(str(path), self.limits)[1] == ""

    def test_photos_that_cannot_be_used(self, tmp_path):
        broken, bomb = tmp_path / "broken.jpg", tmp_path / "bomb.png"
        broken.write_bytes(b"no picture at all")
        Image.new("1", (5000, 5000)).save(bomb)  # 25 megapixels in some kilobytes
        for path, message in [(None, "drop a photo"), (broken, "'broken.jpg'"), (bomb, "25 megapixels")]:
            with pytest.raises(ValueError, match=message) as caught:
                read_photo(path and str(path), self.limits)
            assert str(tmp_path) not in str(caught.value)  # no folder of the server
        with pytest.raises(ValueError, match="no longer here"):
            read_photo(str(tmp_path / "gone.jpg"), self.limits)
        with pytest.raises(ValueError, match="MB"):
            bomb.write_bytes(bytes(2_000_000))
            read_photo(str(bomb), Limits(file_megabytes=1))

    def test_impossible_limits(self):
        with pytest.raises(ValueError, match="queue"):
            Limits(queue=0)


class TestGuard:
    def test_old_files_go_first_and_kept_ones_stay(self, tmp_path):
        now = time.time()
        for name, age in (("ancient", 9000), ("old", 300), ("newer", 200), ("now", 0)):
            (tmp_path / "sub").mkdir(exist_ok=True)
            path = tmp_path / "sub" / name
            path.write_bytes(bytes(1000))
            os.utime(path, (now - age, now - age))
        kept = frozenset({tmp_path / "sub" / "ancient"})
        assert sweep(tmp_path, 10_000, 3600, kept) == 3000
        assert sweep(tmp_path, 2_000, 3600, kept) == 2000
        assert sweep(tmp_path, 10, 3600, kept) == 1000  # the last one may be in use
        assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["ancient", "now"]
        assert sweep(tmp_path, 10_000, 3600) == 1000

    def test_the_folder_goes_and_the_environment_is_as_before(self, monkeypatch):
        monkeypatch.setenv("GRADIO_TEMP_DIR", "before")
        with OwnFolder(1, 10) as folder:
            assert os.environ["GRADIO_TEMP_DIR"] == str(folder.files)
            (folder.files / "upload.png").write_bytes(b"x")
        assert not folder.path.exists()
        assert os.environ["GRADIO_TEMP_DIR"] == "before"

    @pytest.mark.parametrize(
        "value",
        [
            {"path": "http://127.0.0.1:1/x.png", "meta": {"_type": "gradio.FileData"}},
            {"path": "HTTPS://example.org/x.png"},
            {"path": "x.png", "url": "data:image/png;base64,AAAA"},
            {"path": None, "url": "http://169.254.169.254/latest"},
            ["dog", {"deep": [{"path": "ftp://example.org/x"}]}],
        ],
    )
    def test_addresses_are_refused(self, value):
        with pytest.raises(ValueError, match="fetches nothing"):
            require_uploads([1, value])

    def test_uploads_pass(self):
        require_uploads(
            ["http://a.label", 3, {"path": "/tmp/x.png", "url": "http://h:7860/gradio_api/file=/tmp/x.png"}]
        )

    @pytest.mark.parametrize(
        ("method", "path", "length", "status"),
        [
            ("GET", "/", None, 200),
            ("POST", "/gradio_api/queue/join", "1000", 200),
            ("POST", "/gradio_api/call/segment", "1000", 200),
            ("POST", "/gradio_api/upload", "1500000", 200),
            ("POST", "/gradio_api/upload", "9000000", 413),
            ("POST", "/gradio_api/upload", None, 411),
            ("POST", "/gradio_api/queue/join", "9000000", 413),
            ("POST", "/gradio_api/queue/join", "-1", 411),
            ("POST", "/gradio_api/run/segment", "10", 405),
            ("POST", "/gradio_api/process_recording", "10", 405),
            ("PUT", "/gradio_api/upload", "10", 405),
            ("GET", "/gradio_api/proxy=http://127.0.0.1/", None, 404),
            ("GET", "/gradio_api/deep_link", None, 404),
            ("GET", "/monitoring/summary", None, 404),
        ],
    )
    def test_only_needed_routes(self, method, path, length, status):
        async def behind(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})

        answers = []

        async def send(message):
            answers.append(message)

        headers = [] if length is None else [(b"content-length", length.encode())]
        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        asyncio.run(NeededRoutesOnly(behind, 2)(scope, None, send))
        assert answers[0]["status"] == status


class TestWork:
    def test_what_is_found_is_what_the_pipeline_finds(self, workshop, model_folder, photo_file, photo, tmp_path):
        found = workshop.segment(Asked(str(photo_file), "cat, dog=puppy, sky", "0.3", "tiny-clip", "sclip", size=64))
        pipe = workshop._pipe("tiny-clip")
        expected = pipe(
            Image.open(photo_file), "cat, dog=puppy, sky", method="sclip", background=0.3, size=64, semantic=True
        )
        np.testing.assert_array_equal(found.semantic_map, expected["semantic_map"])
        assert found.record["model"] == "tiny-clip"  # not where it lies
        assert found.record["settings"]["method"] == "sclip"
        assert any("has no ARM" in fact for fact in found.facts)

        picture, labels, legend = write_files(found, tmp_path, 0.5, True, "colorblind")
        np.testing.assert_array_equal(np.asarray(Image.open(labels)), expected["semantic_map"])
        record = json.loads(Path(legend).read_text(encoding="utf-8"))
        assert sum(segment["pixels"] for segment in record["segments"]) == photo.width * photo.height
        assert record["image"] == "cat.jpg" and str(photo_file.parent) not in json.dumps(record)
        assert Image.open(picture).width >= photo.width

    def test_methods_are_compared_with_one_pass(self, workshop, model_folder, photo_file):
        photo, comparison = workshop.compare(
            Asked(str(photo_file), "cat, dog", model="tiny-clip"), ["sclip", "clip"], "off"
        )
        assert [result.name for result in comparison.results] == ["clip", "sclip"]
        assert comparison.results[0].semantic_map.shape == (photo.height, photo.width)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": "../../etc"}, "does not have that model"),
            ({"method": "proxyclip"}, "does not have that method"),
            ({"compensation": True}, "without a Stable Diffusion"),
            ({"size": 9999}, "between 32 and 672"),
            ({"background": "2.5"}, "between 0 and 1"),
            ({"labels": "cat, Cat"}, "given twice"),
            ({"photo": None}, "drop a photo"),
        ],
    )
    def test_what_cannot_be_done(self, workshop, model_folder, photo_file, changes, message):
        fields = {"photo": str(photo_file), "labels": "cat, dog", "model": "tiny-clip", **changes}
        with pytest.raises(ValueError, match=message):
            workshop.segment(Asked(**fields))

    def test_comparing_needs_a_method_and_an_arm(self, workshop, model_folder, photo_file):
        asked = Asked(str(photo_file), "cat, dog", model="tiny-clip")
        with pytest.raises(ValueError, match="at least one method"):
            workshop.compare(asked, [], "off")
        with pytest.raises(ValueError, match="has no ARM"):
            workshop.compare(asked, ["clip"], "both")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def server(root, model_folder, tmp_path_factory):
    """The page in a process of its own; gives its address and the folder that temporary files go to."""
    pytest.importorskip("gradio", reason="needs gradio: pip install 'arm_hf[app]'")
    port, temporary = free_port(), tmp_path_factory.mktemp("tmp")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GRADIO"))}
    environment |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    log = temporary / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "arm_hf.cli", "app", "--port", str(port)),
                *("--model", str(model_folder), "--model", "arm-clip-mini"),
            ],
            cwd=temporary,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, process, log)
        yield address, temporary
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
        assert not list(temporary.glob("arm-hf-app-*"))  # all of the visitors' files went with it
    finally:
        process.kill()
        process.wait()


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    """Wait until the page answers."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            pytest.fail(f"the server ended with {process.returncode}\n{log.read_text()}")
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"no answer in {START_SECONDS} s\n{log.read_text()}")


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(server[0], verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


def fields(photo, labels, background="") -> list:
    """The fields of the page, as a request sends them: photo, words, settings, drawing."""
    return [photo, labels, background, "tiny-clip", "the model's own", True, False, 0, 0.5, False, False]


def segment(client, photo, labels, background=""):
    return client.predict(*fields(photo, labels, background), api_name="/segment")


def refusal(address: str, data: list) -> str:
    """What the page answers to a request that a program made up, without a client that uploads files first."""
    body = json.dumps({"data": data}).encode()
    request = urllib.request.Request(f"{address}/gradio_api/call/segment", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{address}/gradio_api/call/segment/{event}", timeout=60) as answer:
        text = answer.read().decode()
    assert "event: error" in text, text
    return text


class TestServer:
    def test_a_client_segments_and_downloads(self, client, photo_file, photo):
        from gradio_client import handle_file

        view, facts, _scores, picture, labels, legend = segment(client, handle_file(photo_file), "cat, dog, <i>sky</i>")
        assert "tiny-clip" in facts and "photo" in facts
        picture, labels, legend = (update["value"] for update in (picture, labels, legend))
        assert {one["name"] for one in view["classes"]} <= {"cat", "dog", "<i>sky</i>"}
        assert sum(one["share"] for one in view["classes"]) == pytest.approx(1)
        record = json.loads(Path(legend).read_text(encoding="utf-8"))
        found = np.asarray(Image.open(labels))
        assert found.shape == (photo.height, photo.width)
        assert {one["id"]: one["pixels"] for one in record["segments"]} == dict(
            zip(*(values.tolist() for values in np.unique(found, return_counts=True)), strict=True)
        )
        assert max(Image.open(picture).size) >= 640

    def test_methods_side_by_side(self, client, photo_file):
        from gradio_client import handle_file

        settings = fields(handle_file(photo_file), "cat, dog")[:8]
        sheet, times = client.predict(*settings, ["clip", "sclip"], "off", False, api_name="/compare")
        assert "clip" in times and "Shared pass" in times
        assert Image.open(sheet).width > 300

    @pytest.mark.parametrize(
        ("labels", "background", "message"),
        [
            ("", "", "type what to look for"),
            (",,=|", "", "empty"),
            ("cat", "7", "between 0 and 1"),
            (", ".join(f"label {n}" for n in range(41)), "", "41 labels"),
        ],
    )
    def test_nonsense_is_one_clear_message(self, client, photo_file, labels, background, message):
        from gradio_client import handle_file
        from gradio_client.exceptions import AppError

        with pytest.raises(AppError, match=message) as caught:
            segment(client, handle_file(photo_file), labels, background)
        assert "\n" not in str(caught.value).strip() and "Traceback" not in str(caught.value)

    def test_files_that_are_no_photos(self, client, tmp_path):
        from gradio_client import handle_file
        from gradio_client.exceptions import AppError

        path = tmp_path / "broken.jpg"
        path.write_bytes(b"\xff\xd8\xff\xe0 not really")
        with pytest.raises(AppError, match="cannot be read"):
            segment(client, handle_file(path), "cat")

    def test_no_other_file_can_be_read(self, server, tmp_path):
        address, temporary = server
        secret = tmp_path / "secret.png"
        Image.new("RGB", (8, 8)).save(secret)
        for path in (secret, "/etc/passwd", "../../etc/passwd", __file__, temporary / "log.txt"):
            file = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
            assert "only files that were uploaded" in refusal(address, fields(file, "cat"))
            assert "only files that were uploaded" in refusal(address, fields(None, file))
            assert status(f"{address}/gradio_api/file={path}") in (403, 404)
        assert status(f"{address}/gradio_api/file=..%2f..%2f..%2fetc%2fpasswd") in (403, 404)

    def test_nothing_is_fetched_for_a_visitor(self, server):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(1)
            there = f"http://127.0.0.1:{listener.getsockname()[1]}/cat.png"
            for file in (
                {"path": there},
                {"path": "x.png", "url": there},
                {"path": "x", "url": "data:image/png;base64,AA"},
            ):
                file["meta"] = {"_type": "gradio.FileData"}
                assert "fetches nothing" in refusal(server[0], fields(file, "cat"))
                assert "fetches nothing" in refusal(server[0], fields(None, file))
            with pytest.raises(TimeoutError):
                listener.accept()

    def test_an_upload_that_is_too_large_is_refused(self, server):
        request = urllib.request.Request(f"{server[0]}/gradio_api/upload", data=b"x", method="POST")
        request.add_header("Content-Length", "999999999")
        assert status(request) == 413


def status(request) -> int:
    """Status of an HTTP answer."""
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_without_gradio_the_command_says_what_to_install(run_python):
    code = (
        "import sys; sys.modules['gradio'] = None; sys.argv = ['arm-hf', 'app']\n"
        "import contextlib, io\nfrom arm_hf.cli import main\nerrors = io.StringIO()\n"
        "with contextlib.redirect_stderr(errors):\n"
        "    try:\n        main()\n    except SystemExit as end:\n        code = end.code\n"
        "print(code, errors.getvalue())"
    )
    assert "pip install 'arm_hf[app]'" in run_python(code)


def test_a_space_gets_the_same_file(root, tmp_path):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'arm_hf[app]'")
    from arm_hf.app.space import write_space

    paths = write_space(tmp_path / "space", ["org/model"], None)
    assert sorted(Path(path).name for path in paths) == ["README.md", "app.py", "requirements.txt"]
    page = (root / "arm_hf" / "app" / "page.py").read_text(encoding="utf-8")
    written = (tmp_path / "space" / "app.py").read_text(encoding="utf-8")
    assert written.replace("    os.environ.setdefault('ARM_HF_MODELS', 'org/model')\n", "") == page
    assert "arm_hf[app]" in (tmp_path / "space" / "requirements.txt").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="there already"):
        write_space(tmp_path / "space")
    with pytest.raises(ValueError, match="folder of this machine"):
        write_space(tmp_path / "other", [str(tmp_path)])


@pytest.fixture
def tab(server):
    """The page in a real browser; what went wrong in it fails the test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    browser_path = next(filter(None, map(shutil.which, names)), None)
    if browser_path is None:
        pytest.skip(f"needs one of {', '.join(names)}, such as Debian's package chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1300, "height": 950})
        tab.set_default_timeout(120_000)
        problems: list[str] = []
        tab.on("pageerror", lambda error: problems.append(str(error)))
        foreign: list[str] = []
        tab.on("request", lambda request: foreign.append(request.url) if not _own(request.url, server[0]) else None)
        tab.goto(server[0])
        tab.wait_for_selector("#segment")
        yield tab
        browser.close()
    assert not problems
    assert not foreign  # no script, font or picture from elsewhere


def _own(address: str, server: str) -> bool:
    return address.startswith((server, "data:", "blob:"))


def canvas(tab) -> str:
    """What the overlay shows."""
    return tab.evaluate("document.querySelector('#viewer canvas').toDataURL()")


@pytest.mark.slow
class TestBrowser:
    def test_upload_segment_hover_and_redraw(self, tab, photo, tmp_path):
        scene = Image.new("RGB", (photo.width, 2 * photo.height), (120, 170, 235))
        scene.paste(photo, (0, photo.height))
        photo_file = tmp_path / "scene.jpg"
        scene.save(photo_file)
        tab.set_input_files("#photo input[type=file]", str(photo_file))
        tab.wait_for_selector("#photo img[src*='scene.jpg']")
        tab.get_by_role("button", name="Settings").click()
        tab.locator("#model input").click()
        tab.get_by_role("option", name="arm-clip-mini").click()
        words = {"cat", "wall", "<h1>big</h1>", "sky"}
        tab.fill("#labels textarea", ", ".join(words))
        tab.click("#segment")
        tab.wait_for_selector("#viewer .legend button")
        legend = tab.locator("#viewer .legend button .name").all_inner_texts()
        assert len(legend) > 1 and set(legend) <= words
        assert tab.locator("#viewer h1").count() == 0  # a label is text, whatever it holds

        box = tab.locator("#viewer canvas").bounding_box()
        tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        tip = tab.locator("#viewer .tip").inner_text()
        assert tip.split(" · ")[0] in legend and 0 <= float(tip.split(" · ")[1]) <= 1
        tab.mouse.move(5, 5)

        filled = canvas(tab)
        tab.check("#contours input")
        tab.wait_for_timeout(500)
        outlined = canvas(tab)
        tab.check("#safe input")
        tab.wait_for_timeout(500)
        assert len({filled, outlined, canvas(tab)}) == 3
        tab.locator("#viewer .legend button").first.click()
        assert tab.locator("#viewer .legend button[aria-pressed=true]").count() == 1

        with tab.expect_download() as download:
            tab.click("#save-labels")
        download.value.save_as(tmp_path / "labels.png")
        with Image.open(photo_file) as photo, Image.open(tmp_path / "labels.png") as labels:
            assert labels.size == photo.size and labels.mode == "P"
        tab.get_by_role("tab", name="Score maps").click()
        tab.wait_for_selector("#scores img")

    def test_nonsense_is_a_message_on_the_page(self, tab):
        tab.fill("#labels textarea", ",,,")
        tab.click("#segment")
        toast = tab.locator("[data-testid=toast-body], .toast-body").first
        toast.wait_for()
        assert "label" in toast.inner_text() and "Traceback" not in toast.inner_text()

    def test_methods_side_by_side(self, tab):
        tab.get_by_role("tab", name="Compare methods").click()
        tab.click("#compare")
        tab.wait_for_selector("#compared img")
        assert "Shared pass" in tab.locator("#times").inner_text()
