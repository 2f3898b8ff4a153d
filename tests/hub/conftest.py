"""A small Hub on this machine: the endpoints that huggingface_hub calls to publish and to load, over real HTTP.

It keeps repositories as commits of content-addressed files, checks tokens, and can be told to fail. Weights travel by
LFS as on the Hub, or by Xet: then the storage behind it is a folder that hf_xet itself writes and reads (`local://`).
"""

import base64
import hashlib
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

WRITE_TOKEN, READ_TOKEN = "hf_writewritewritewritewritewrite", "hf_readreadreadreadreadreadread"


@dataclass
class Stored:
    """A file of a commit: git blob (content known to the Hub) or LFS pointer (content in the large-file storage)."""

    oid: str
    size: int
    lfs: bool


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Stored], message: str) -> str:
        sha = hashlib.sha1(f"{branch}{len(self.commits)}{sorted(files)}{message}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Answer(Exception):
    """Ends a request with a status."""

    def __init__(self, status: int, message: str = "", code: str = ""):
        self.status, self.message, self.code = status, message, code


class FakeHub:
    """State of the server; `url` goes into HF_ENDPOINT.

    Attributes:
        requests: Method and path of every request.
        before: Called with the handler before each request; it may raise `Answer` or close the connection.
        xet: Folder of the Xet storage; None serves large files by LFS.
    """

    def __init__(self, folder: Path, xet: Path | None = None):
        self.folder, self.xet = folder, xet
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.before: Callable[[Any], None] = lambda handler: None
        self.lock = threading.Lock()
        hub = self

        class Bound(Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = f"http://localhost:{self.server.server_port}"  # another host, as on the Hub: it sees no token
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def blob(self, oid: str) -> Path:
        return self.folder / oid

    def put_blob(self, content: bytes, oid: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{oid}.{threading.get_ident()}.part"
        part.write_bytes(content)
        part.replace(self.blob(oid))

    def keep(self, content: bytes) -> Stored:
        """Store a small file under git's hash of it."""
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.put_blob(content, oid)
        return Stored(oid, len(content), lfs=False)

    def content(self, repo_id: str, name: str, revision: str = "main") -> bytes:
        repository = self.repositories[repo_id]
        return self.blob(repository.commits[repository.branches[revision]][name].oid).read_bytes()

    def files(self, repo_id: str, revision: str = "main") -> set[str]:
        repository = self.repositories[repo_id]
        return set(repository.commits[repository.branches[revision]])

    def asked(self, part: str) -> int:
        return sum(part in path for _, path in self.requests)

    def xet_hash(self, sha256: str) -> str | None:
        """Xet's own hash of a file with this SHA-256, from the shards that a client has left in the storage."""
        for shard in (self.xet / "xet" / "xorbs" / "shards").glob("*.mdb") if self.xet else ():
            for found, xet_hash in files_of_shard(shard.read_bytes()):
                if found == sha256:
                    return xet_hash
        return None


def files_of_shard(data: bytes) -> Iterator[tuple[str, str]]:
    """(SHA-256, Xet hash) of the files a shard lists: 48-byte records; a hash is written as four little-endian u64."""
    words = lambda record: "".join(f"{word:016x}" for word in struct.unpack("<4Q", record[:32]))  # noqa: E731
    position = 48  # the header: tag, version, size of the footer
    while (record := data[position : position + 48])[:32] != b"\xff" * 32:
        flags, segments = struct.unpack("<II", record[32:40])
        verified, with_sha = bool(flags & 1 << 31), bool(flags & 1 << 30)
        position += 48 * (1 + segments * (1 + verified))
        if with_sha:
            yield words(data[position : position + 48]), words(record)
            position += 48


class Handler(BaseHTTPRequestHandler):
    """Routes of the Hub's HTTP interface, models only."""

    protocol_version = "HTTP/1.1"
    server_hub: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do(self) -> None:
        hub = self.server_hub
        with hub.lock:
            hub.requests.append((self.command, self.path))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        try:
            hub.before(self)
            if self.close_connection:
                return
            with hub.lock:
                self.route(urlsplit(self.path))
        except Answer as answer:
            headers = {"X-Error-Message": answer.message} if answer.message else {}
            if answer.code:
                headers["X-Error-Code"] = answer.code
            self.send(answer.status, {"error": answer.message}, headers)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = do

    def send(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def require_write(self) -> None:
        if self.token not in (WRITE_TOKEN, READ_TOKEN):
            raise Answer(401, "Invalid credentials in Authorization header")
        if self.token != WRITE_TOKEN:
            raise Answer(403, "You don't have the rights to write here")

    def repository(self, repo_id: str) -> Repository:
        repository = self.server_hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.token not in (WRITE_TOKEN, READ_TOKEN)):
            raise Answer(404 if self.token else 401, "Repository not found", "RepoNotFound")
        return repository

    def commit_of(self, repository: Repository, revision: str) -> str:
        sha = repository.resolve(unquote(revision))
        if sha is None:
            raise Answer(404, f"Invalid rev id: {unquote(revision)}", "RevisionNotFound")
        return sha

    def route(self, url: Any) -> None:
        parts = url.path.strip("/").split("/")
        match [self.command, *parts]:
            case ["POST", "api", "repos", "create"]:
                self.create(json.loads(self.body))
            case ["POST", "api", "validate-yaml"]:
                self.validate(json.loads(self.body)["content"])
            case ["GET", "api", "models", owner, name]:
                self.info(f"{owner}/{name}", "main")
            case ["GET", "api", "models", owner, name, "revision", revision]:
                self.info(f"{owner}/{name}", revision)
            case ["GET", "api", "models", owner, name, "tree", revision, *folder]:
                self.tree(f"{owner}/{name}", revision, "/".join(folder), parse_qs(url.query))
            case ["POST", "api", "models", owner, name, "branch", branch]:
                self.branch(f"{owner}/{name}", unquote(branch))
            case ["POST", "api", "models", owner, name, "preupload", revision]:
                self.preupload(f"{owner}/{name}", revision, json.loads(self.body)["files"])
            case ["GET", "api", "models", owner, name, "xet-write-token" | "xet-read-token", _] if self.server_hub.xet:
                self.repository(f"{owner}/{name}")
                if "write" in url.path:
                    self.require_write()
                self.xet_token()
            case ["POST", "api", "models", owner, name, "commit", revision]:
                self.commit(f"{owner}/{name}", revision, [json.loads(line) for line in self.body.splitlines()])
            case ["POST", owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                self.lfs_batch(f"{owner}/{name.removesuffix('.git')}", json.loads(self.body)["objects"])
            case ["PUT", "lfs-storage", oid]:
                if hashlib.sha256(self.body).hexdigest() != oid:
                    raise Answer(400, "checksum")
                self.server_hub.put_blob(self.body, oid)
                self.send(200, {})
            case ["POST", "lfs-verify"]:
                wanted = json.loads(self.body)
                self.send(200 if self.server_hub.blob(wanted["oid"]).stat().st_size == wanted["size"] else 400, {})
            case ["GET" | "HEAD", "lfs-storage", oid]:
                assert not self.token, "the token was sent to the storage of large files"
                self.send(200, self.server_hub.blob(oid).read_bytes(), {"ETag": f'"{oid}"'})
            case ["GET" | "HEAD", owner, name, "resolve", revision, *path]:
                self.resolve(f"{owner}/{name}", revision, unquote("/".join(path)))
            case _:
                raise Answer(404, f"the fake Hub has no {self.command} {url.path}")

    def create(self, wanted: dict) -> None:
        self.require_write()
        repo_id = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        url = {"url": f"{self.server_hub.url}/{repo_id}", "name": repo_id}
        if wanted["organization"] == "strangers":
            raise Answer(403, "You don't have the rights to create a model under the namespace strangers")
        if repo_id in self.server_hub.repositories:
            self.send(409, {"error": "You already created this model repo", **url})
            return
        repository = Repository(wanted.get("visibility") == "private")
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        repository.commit("main", {".gitattributes": self.server_hub.keep(attributes)}, "initial commit")
        self.server_hub.repositories[repo_id] = repository
        self.send(200, url)

    def validate(self, card: str) -> None:
        errors = [] if card.startswith("---\n") else [{"message": "the card has no metadata"}]
        self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id)
        sha = self.commit_of(repository, revision)
        siblings = [{"rfilename": name} for name in repository.commits[sha]]
        self.send(200, {"id": repo_id, "sha": sha, "private": repository.private, "tags": [], "siblings": siblings})

    def tree(self, repo_id: str, revision: str, folder: str, query: dict) -> None:
        repository = self.repository(repo_id)
        files = repository.commits[self.commit_of(repository, revision)]
        inside = {name: file for name, file in files.items() if not folder or name.startswith(f"{folder}/")}
        if folder and not inside:
            raise Answer(404, f"{folder} does not exist", "EntryNotFound")
        if query.get("recursive", ["false"])[0].lower() != "true":
            inside = {name: file for name, file in inside.items() if "/" not in name[len(folder) + bool(folder) :]}
        entries = []
        for name, file in inside.items():
            entry = {"type": "file", "oid": file.oid, "size": file.size, "path": name}
            if file.lfs:
                entry["lfs"] = {"oid": file.oid, "size": file.size, "pointerSize": 130}
            entries.append(entry)
        self.send(200, entries)

    def branch(self, repo_id: str, branch: str) -> None:
        self.require_write()
        repository = self.repository(repo_id)
        if branch in repository.branches:
            raise Answer(409, "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self.send(201, {})

    def preupload(self, repo_id: str, revision: str, files: list[dict]) -> None:
        self.require_write()
        repository = self.repository(repo_id)
        there = repository.commits[self.commit_of(repository, revision)]
        answers = []
        for file in files:
            large = file["path"].endswith(".safetensors") or file["size"] > 10_000_000
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append({**answer, "oid": there[file["path"]].oid if file["path"] in there else None})
        self.send(200, {"files": answers})

    def lfs_batch(self, repo_id: str, objects: list[dict]) -> None:
        self.require_write()
        self.repository(repo_id)
        url, answers = self.server_hub.url, []
        for wanted in objects:
            if not self.server_hub.blob(wanted["oid"]).exists():
                actions = {"upload": {"href": f"{url}/lfs-storage/{wanted['oid']}"}}
                wanted = {**wanted, "actions": {**actions, "verify": {"href": f"{url}/lfs-verify"}}}
            answers.append(wanted)
        self.send(200, {"transfer": "basic", "objects": answers})

    def xet_token(self) -> None:
        expires = int(time.time()) + 3600
        address = f"local://{self.server_hub.xet}"
        headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        self.send(200, {"casUrl": address, "accessToken": "xet", "exp": expires}, headers)

    def commit(self, repo_id: str, revision: str, lines: list[dict]) -> None:
        self.require_write()
        repository, branch = self.repository(repo_id), unquote(revision)
        head = self.commit_of(repository, revision)
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", head) != head:
            raise Answer(412, "A commit has happened since")
        files = dict(repository.commits[head])
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = self.server_hub.keep(base64.b64decode(value["content"]))
                case "lfsFile":
                    there = self.server_hub.blob(value["oid"]).exists() or self.server_hub.xet_hash(value["oid"])
                    if not there:
                        raise Answer(400, f"{value['path']}: its content never arrived")
                    files[value["path"]] = Stored(value["oid"], value["size"], lfs=True)
                case "deletedFile":
                    del files[value["path"]]
        sha = repository.commit(branch, files, header["summary"])
        url = f"{self.server_hub.url}/{repo_id}/commit/{sha}"
        self.send(200, {"success": True, "commitOid": sha, "commitUrl": url})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        hub, repository = self.server_hub, self.repository(repo_id)
        sha = self.commit_of(repository, revision)
        file = repository.commits[sha].get(path)
        if file is None:
            headers = {"X-Repo-Commit": sha, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self.send(404, {}, headers)
            return
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"'}
        if not file.lfs:
            self.send(200, hub.blob(file.oid).read_bytes(), headers)
            return
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.oid}"'}
        if (xet_hash := hub.xet_hash(file.oid)) is not None:
            auth = f"{hub.url}/api/models/{repo_id}/xet-read-token/{sha}"
            headers |= {"X-Xet-Hash": xet_hash, "Link": f'<{auth}>; rel="xet-auth"'}
        self.send(302, {}, {**headers, "Location": f"{hub.cdn}/lfs-storage/{file.oid}"})


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub that serves large files by LFS."""
    server = FakeHub(tmp_path / "hub-storage")
    yield server
    server.close()


@pytest.fixture
def xet_hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub that serves large files by Xet."""
    server = FakeHub(tmp_path / "hub-storage", xet=tmp_path / "xet-storage")
    yield server
    server.close()
