"""What is fetched and what is not: a server that misbehaves, and addresses that lead to where nobody may look.

The server listens at 127.0.0.2, which stands for the public network here; 127.0.0.1 is this machine.
"""

import io
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from PIL import Image
from typer.testing import CliRunner

from arm_hf.cli import app
from arm_hf.folders import ImageFile, collect_images, read_image
from arm_hf.modeling import downloads
from arm_hf.modeling.downloads import DownloadError, download, is_public
from arm_hf.modeling.images import UnreadableImage, load_image

OUTSIDE = "127.0.0.2"
NAMES = {"photos.example": OUTSIDE, "inner.example": "127.0.0.1"}


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """`/cat.png` is a picture; the other paths are faults."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[tuple[str, str]]] = []

    def do_GET(self):
        Handler.asked.append((self.path, self.headers["Host"]))
        name, _, argument = self.path.lstrip("/").partition("?")
        getattr(self, f"_{name.partition('.')[0]}")(argument)

    def _head(self, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Connection": "close", **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()

    def _cat(self, kind: str) -> None:
        data = picture()
        self._head(Content_Type=kind or "image/png", Content_Length=str(len(data)))
        self.wfile.write(data)

    def _to(self, target: str) -> None:
        self._head(302, Location=target, Content_Length="0")

    def _missing(self, _: str) -> None:
        self._head(404, Content_Length="0")

    def _promises(self, size: str) -> None:
        self._head(Content_Type="image/png", Content_Length=size)

    def _endless(self, _: str) -> None:
        self._head(Content_Type="image/png")
        try:
            for _ in range(10_000):
                self.wfile.write(bytes(65536))
        except OSError:  # the client has seen enough
            pass

    def _drips(self, _: str) -> None:
        self._head(Content_Type="image/png")
        try:
            while True:
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass

    def _silent(self, _: str) -> None:
        time.sleep(2)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[str]:
    """Address of the server, whose own IP counts as public; names that are looked up are those of NAMES alone."""
    server = ThreadingHTTPServer((OUTSIDE, 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    Handler.asked = []
    look_up = socket.getaddrinfo

    def named(host, *args, **kwargs):
        return look_up(NAMES.get(host, host), *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", named)
    monkeypatch.setattr(downloads, "is_public", lambda host: host == OUTSIDE or is_public(host))
    monkeypatch.delenv(downloads.LOCAL_ADDRESSES, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    try:
        yield f"http://{OUTSIDE}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def inner(monkeypatch) -> Iterator[tuple[int, list[str]]]:
    """A service of this machine that must not be asked: its port, and what it was asked."""
    asked: list[str] = []

    class Inner(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.end_headers()
            self.wfile.write(picture())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Inner)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server.server_port, asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["", "image/jpeg", "application/octet-stream", "IMAGE/PNG;%20q=1"])
def test_pictures_arrive(server, kind):
    assert load_image(f"{server}/cat.png?{kind}").size == (12, 8)


def test_a_name_is_looked_up_once_and_sent_to_the_server(server):
    port = server.rpartition(":")[2]
    assert load_image(f"http://photos.example:{port}/to?/cat.png").size == (12, 8)
    assert Handler.asked == [("/to?/cat.png", f"photos.example:{port}"), ("/cat.png", f"photos.example:{port}")]


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:{port}/",
        "http://localhost:{port}/",
        "http://inner.example:{port}/",
        "http://[::1]:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://0.0.0.0:{port}/",
        "http://2130706433:{port}/",  # 127.0.0.1 as one number
        "http://10.0.0.1/",
        "http://192.168.1.1/",
        "http://169.254.169.254/latest/meta-data",
        "http://[fe80::1]/",
        "http://[64:ff9b::7f00:1]/",
    ],
)
def test_this_machine_and_private_networks_are_refused(server, inner, target):
    port, asked = inner
    address = target.format(port=port)
    for given in (address, f"{server}/to?{address}"):
        with pytest.raises(UnreadableImage, match=r"private network|no machine called"):
            load_image(given)
    assert not asked


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://photos.example/cat.png", "gopher://photos.example/"])
def test_other_schemes_are_refused(server, target):
    with pytest.raises(UnreadableImage, match="only http and https"):
        load_image(f"{server}/to?{target}")
    with pytest.raises(DownloadError, match="only http and https"):
        download(target)
    with pytest.raises(UnreadableImage, match="no such file"):
        load_image(target)


def test_private_networks_on_request(server, inner, monkeypatch):
    port, asked = inner
    monkeypatch.setenv(downloads.LOCAL_ADDRESSES, "1")
    assert load_image(f"http://127.0.0.1:{port}/mine.png").size == (12, 8)
    assert asked == ["/mine.png"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("cat.png?text/html", "sent text/html"),
        ("cat.png?application/json", "sent application/json"),
        ("missing.png", "answered 404"),
        ("promises?999999999999", "larger than 1 MB"),
        ("endless", "larger than 1 MB"),
        ("to?/to?/to?/to?/to?/to?/to?/cat.png", "more than 5 redirects"),
        ("drips", "longer than 0.5 s"),
        ("silent", "longer than 0.5 s"),
    ],
)
def test_servers_that_misbehave(server, path, message):
    with pytest.raises(DownloadError, match=message) as caught:
        download(f"{server}/{path}", timeout=0.5 if "longer" in message else 60, most_bytes=10**6)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "fc00::1",
        "fe80::1%eth0",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "2002:7f00:1::",
        "ff02::1",
    ],
)
def test_other_addresses(address):
    assert not is_public(address)


def test_the_command_fetches_what_was_asked_for_and_nothing_else(server, tmp_path):
    (given,) = collect_images([f"{server}/cat.png"])
    assert given.fetch and read_image(given).size == (12, 8)
    Handler.asked = []
    for source in (f"{server}/cat.png", "HTTP://127.0.0.2/cat.png", "hf://datasets/org/name/cat.png"):
        with pytest.raises(UnreadableImage, match="nothing is fetched"):
            read_image(ImageFile(source, "cat.png"))
    assert not Handler.asked


def test_a_parquet_file_makes_the_command_fetch_nothing(server, tiny_clip_folder, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"path": f"{server}/cat.png", "bytes": None}, {"path": "../../up.png", "bytes": picture()}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "rows.parquet")
    out = tmp_path / "deep" / "out"
    words = ["segment", tmp_path / "rows.parquet", "--labels", "cat, sky", "--out", out, "--model", tiny_clip_folder]
    done = CliRunner().invoke(app, [*map(str, words), "--templates", "single"])
    assert done.exit_code == 1, done.output
    assert "nothing is fetched" in done.output and not Handler.asked
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    assert written == {"deep/out/00000/00000/001.png", "deep/out/00000/00000/001_overlay.png"}


def test_a_data_set_for_evaluation_fetches_nothing(server):
    from arm_hf.data.segmentation_data import SegmentationData, make_dataset

    data = make_dataset(["one"], [f"{server}/cat.png"], [f"{server}/cat.png"])  # type: ignore[list-item]
    found = SegmentationData("rows", "val", ("cat", "sky"), 255, None, data)
    with pytest.raises(UnreadableImage, match="nothing is fetched"):
        found.read(found.dataset[0])
    with pytest.raises(UnreadableImage, match="nothing is fetched"):
        found.read_labels(found.dataset[0])
    assert not Handler.asked


@pytest.mark.parametrize(
    ("address", "stem"),
    [
        ("http://h.example/a/cat.png", "cat"),
        ("http://h.example/%2e%2e", "h.example"),
        ("http://h.example/a%2f%2e%2e%2fcat.png", "cat"),
        ("http://h.example/..%5c..%5ccat.png", ".._.._cat"),
        ("http://h.example/", "h.example"),
    ],
)
def test_results_of_an_address_stay_in_their_folder(address, stem, tmp_path):
    from arm_hf.folders import plan_outputs

    (outputs,) = plan_outputs(collect_images([address]), tmp_path / "out")
    for path in outputs.paths():
        assert path.resolve().parent == (tmp_path / "out").resolve()
    assert outputs.legend.name.startswith(stem.removesuffix(".example"))
