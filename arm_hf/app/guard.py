"""What keeps a public page safe: its own folder on disk, only the routes it needs, nothing fetched for a visitor."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

_GRADIO_FOLDER = "GRADIO_TEMP_DIR"  # Gradio's variable
_SWEEP_SECONDS = 30.0
_YOUNGEST = 20.0  # seconds for which a file is left alone even if the folder is too full: it may be in use

# What the browser sends to a page of Gradio: joining the queue, leaving it, uploading. The rest of Gradio's POST routes
# run functions past the queue, or unpack videos.
_POST_ROUTES = ("/gradio_api/queue/join", "/gradio_api/call/", "/gradio_api/cancel", "/gradio_api/reset")
_UPLOAD_ROUTE = "/gradio_api/upload"
_CLOSED_ROUTES = (
    "/gradio_api/proxy=",
    "/gradio_api/deep_link",
    "/gradio_api/stream/",
    "/gradio_api/run-history",
    "/gradio_api/dev/",
    "/monitoring",
)
_LARGEST_REQUEST = 256 * 1024  # bytes of one that is no upload: fields of the page, and paths of files sent before

Scope = MutableMapping[str, Any]


class OwnFolder:
    """A temporary folder for all that visitors send and get; it is swept while it is open, and vanishes at the end.

    Attributes:
        path: The folder.
        files: Where Gradio puts uploads and results.

    Args:
        disk_megabytes: Size above which the oldest files are deleted.
        keep_seconds: Age at which a file is deleted in any case.
    """

    def __init__(self, disk_megabytes: int, keep_seconds: int):
        self.path = Path(tempfile.mkdtemp(prefix="arm-hf-app-"))
        self.files = self.path / "files"
        self.files.mkdir()
        self._most_bytes, self._keep_seconds = disk_megabytes * 10**6, keep_seconds
        self._kept: frozenset[Path] = frozenset()
        self._done = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep_on, name="sweeper", daemon=True)
        self._before = os.environ.get(_GRADIO_FOLDER)

    def __enter__(self) -> OwnFolder:
        os.environ[_GRADIO_FOLDER] = str(self.files)
        self._sweeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._sweeper.join()
        if self._before is None:
            del os.environ[_GRADIO_FOLDER]
        else:
            os.environ[_GRADIO_FOLDER] = self._before
        shutil.rmtree(self.path, ignore_errors=True)

    def keep_present(self) -> None:
        """Never sweep the files that are there now: the page's own examples."""
        self._kept = frozenset(path for path in self.files.rglob("*") if path.is_file())

    def _sweep_on(self) -> None:
        while not self._done.wait(_SWEEP_SECONDS):
            sweep(self.files, self._most_bytes, self._keep_seconds, self._kept)


def sweep(folder: Path, most_bytes: int, keep_seconds: float, kept: frozenset[Path] = frozenset()) -> int:
    """Delete files that are too old, then the oldest until the rest fits; return the bytes that are left.

    Args:
        folder: Where to look, sub-folders included.
        most_bytes: What may stay.
        keep_seconds: Age at which a file goes.
        kept: Files that stay whatever their age.
    """
    now, files = time.time(), []
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            try:
                status = path.lstat()
            except OSError:  # gone meanwhile
                continue
            if path not in kept:
                files.append((status.st_mtime, status.st_size, path))
    left = sum(size for _, size, _ in files)
    for changed, size, path in sorted(files, key=lambda file: file[0]):
        age = now - changed
        if age > keep_seconds or (left > most_bytes and age > _YOUNGEST):
            path.unlink(missing_ok=True)
            left -= size
    return left


def require_uploads(value: Any) -> None:
    """Make sure that a request's fields name no file but uploaded ones: no address to fetch, no data in the address.

    That a path lies in the page's own folder Gradio checks itself.

    Raises:
        ValueError: One of them does.
    """
    if isinstance(value, dict):
        for key in ("path", "url"):
            address = value.get(key)
            if isinstance(address, str) and address.partition(":")[0].casefold() in ("http", "https", "data", "ftp"):
                own = key == "url" and "/gradio_api/file=" in address  # how a browser names a file it uploaded
                if not own:
                    raise ValueError("this page fetches nothing from addresses; upload the photo itself")
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            require_uploads(item)


class NeededRoutesOnly:
    """ASGI middleware that answers only what the page needs, and no oversized requests.

    Args:
        app: The application behind it.
        file_megabytes: Largest upload.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], file_megabytes: int):
        self.app, self.file_bytes = app, file_megabytes * 10**6

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        """Pass a request on, or answer 404, 405, 411 or 413."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": refusal[0], "headers": headers})
        await send({"type": "http.response.body", "body": refusal[1].encode()})

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        path, method = scope["path"].rstrip("/") or "/", scope["method"]
        if any(path.startswith(closed.rstrip("/")) for closed in _CLOSED_ROUTES):
            return 404, "not part of this page"
        if method in ("GET", "HEAD", "OPTIONS"):
            return None
        upload = path == _UPLOAD_ROUTE
        if method != "POST" or not (upload or f"{path}/".startswith(_POST_ROUTES)):
            return 405, "not part of this page"
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return 411, "send the length of the request"
        # An upload's own frame (names, boundaries) is small.
        most = self.file_bytes + _LARGEST_REQUEST if upload else _LARGEST_REQUEST
        if int(length) > most:
            return 413, f"this page takes {most / 1e6:.1f} MB"
        return None
