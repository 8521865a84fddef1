"""A small Hugging Face Hub on the loopback address, so that tests need no network.

In a test: `with LocalHub(root) as hub: subprocess.run(..., env=os.environ | hub.environment(home))`.
On the command line: `python -m tests.hub.server ROOT PORT`, then `HF_ENDPOINT=http://127.0.0.1:PORT`.

It serves ROOT/models/OWNER/NAME and ROOT/datasets/OWNER/NAME as the Hub does for huggingface_hub, transformers and
datasets: files by revision with ETag, X-Repo-Commit and ranges, large files (LFS) by a redirect to another host, the
API's info, tree, paths-info, refs, commits and discussions, and the Hub's error codes. No Xet and no uploads.

A folder with a file `.gated` needs the token that is written in it: 401 without a token, 403 with another one. A folder
NAME@pr is the open pull request 1 of NAME, as SFconvertbot opens it ("Adding `safetensors` variant of this model").
"""

import argparse
import contextlib
import functools
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

GATE = ".gated"
PULL_REQUEST = "refs/pr/1"
LFS_SUFFIXES = {".arrow", ".bin", ".gguf", ".model", ".parquet", ".pth", ".safetensors"}
DATE = "2024-01-01T00:00:00.000Z"
CHUNK_BYTES = 1 << 20

FILE_PATH = re.compile(r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
API_PATH = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
    r"(?:/(?P<what>revision|tree|paths-info|refs|commits|discussions)(?:/(?P<revision>[^/]+))?(?:/(?P<folder>.+))?)?"
)


class Refused(Exception):
    """An answer other than a file or a description."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


# ----------------------------------------------------------------------------- repositories


def git_blob_id(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class RepositoryFile:
    """A file as the Hub lists it; `sha256` is None for one that git keeps itself."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        self.path, self.size = path, len(content)
        self.sha256 = hashlib.sha256(content).hexdigest() if path.suffix in LFS_SUFFIXES else None
        self.blob_id = git_blob_id(self.pointer() if self.sha256 else content)

    def pointer(self) -> bytes:
        """What git keeps instead of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    def lfs(self, digest: str) -> dict[str, Any]:
        """The `lfs` part of a description, empty for a small file; `digest` is its key for the SHA-256."""
        if not self.sha256:
            return {}
        return {"lfs": {digest: self.sha256, "size": self.size, "pointerSize": len(self.pointer())}}


@functools.cache
def read_file(path: Path, _modified_ns: int, _size: int) -> RepositoryFile:
    """The description of a file, worked out again when the file has changed."""
    return RepositoryFile(path)


class Repository:
    """A folder as the Hub shows it: its files and a commit that follows from them."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, RepositoryFile] = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != GATE:
                status = path.stat()
                file = read_file(path, status.st_mtime_ns, status.st_size)
                self.files[path.relative_to(folder).as_posix()] = file
        parents = {parent.as_posix() for name in self.files for parent in Path(name).parents}
        self.folders = sorted(parents - {"."})
        self.commit = git_blob_id(json.dumps([(name, file.blob_id) for name, file in self.files.items()]).encode())

    def siblings(self, details: bool) -> list[dict[str, Any]]:
        """The files in the repository's description; sizes and digests only with `details`."""
        return [
            {"rfilename": name} | ({"size": file.size, "blobId": file.blob_id} | file.lfs("sha256") if details else {})
            for name, file in self.files.items()
        ]

    def entry(self, name: str) -> dict[str, Any]:
        """A file or folder in a tree listing."""
        if name not in self.files:
            return {"type": "directory", "path": name, "size": 0, "oid": git_blob_id(name.encode())}
        file = self.files[name]
        last = {"lastCommit": {"id": self.commit, "title": "Upload", "date": DATE}}
        return {"type": "file", "path": name, "size": file.size, "oid": file.blob_id} | file.lfs("oid") | last

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """What lies in a folder ("" for the top)."""
        if folder and folder not in self.folders:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        start = f"{folder}/" if folder else ""
        inside = [name for name in [*self.folders, *self.files] if name.startswith(start)]
        return [self.entry(name) for name in inside if recursive or "/" not in name.removeprefix(start)]


# ----------------------------------------------------------------------------- requests


class Handler(BaseHTTPRequestHandler):
    """One connection; `server.hub` has the settings."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        self.hub.record(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.pause(self.hub.delay)
        try:
            self.route(urlsplit(self.path).path, parse_qs(urlsplit(self.path).query), body)
        except Refused as refused:
            self.send_json({"error": str(refused)}, refused.status, refused.headers)

    do_HEAD = do_POST = do_GET

    @property
    def hub(self) -> "LocalHub":
        return self.server.hub

    def route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        if path.startswith("/cdn/"):
            self.send_file(self.hub.root / unquote(path.removeprefix("/cdn/")), {}, large=True)
        elif found := FILE_PATH.fullmatch(path):
            kind = "datasets" if found["kind"] else "models"
            repository = self.repository(kind, found["name"], unquote(found["revision"]), content=True)
            self.resolve(repository, unquote(found["file"]))
        elif found := API_PATH.fullmatch(path):
            self.send_json(self.describe(found, query, body))
        elif path.startswith("/api/telemetry"):
            self.send_json({})
        else:
            raise Refused(404, None, "Sorry, we can't find the page you are looking for.")

    def repository(self, kind: str, name: str, revision: str, *, content: bool) -> Repository:
        """The repository at a revision, if it is there and, for its `content`, may be read."""
        folder = self.hub.root / kind / name
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if ".." in name or "@" in name or not folder.is_dir():
            # The real Hub's 401 has no code: huggingface_hub tells it by an https address, which this Hub lacks.
            message = "Repository not found" if token else "Invalid username or password."
            raise Refused(404 if token else 401, "RepoNotFound", message)
        if content:
            self.check_gate(folder / GATE, f"{kind.removesuffix('s')} {name}", token)
        main, pull_request = Repository(folder), folder.with_name(f"{folder.name}@pr")
        if revision in ("main", main.commit):
            return main
        if pull_request.is_dir() and revision in (PULL_REQUEST, Repository(pull_request).commit):
            return Repository(pull_request)
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def check_gate(self, gate: Path, what: str, token: str) -> None:
        if not gate.is_file() or token == gate.read_text().strip():
            return
        restricted = f"Access to {what} is restricted"
        if token:
            raise Refused(403, "GatedRepo", f"{restricted} and you are not in the authorized list.")
        hint = "You must have access to it and be authenticated to access it. Please log in."
        raise Refused(401, "GatedRepo", f"{restricted}. {hint}")

    def resolve(self, repository: Repository, name: str) -> None:
        """Send a small file; redirect to a large one."""
        commit = {"X-Repo-Commit": repository.commit}
        if name not in repository.files:
            raise Refused(404, "EntryNotFound", "Entry not found", **commit)
        file = repository.files[name]
        if not file.sha256:
            self.send_file(file.path, commit | {"ETag": f'"{file.blob_id}"'}, large=False)
            return
        # Another host name, as the real Hub's storage has: clients treat redirects within one host differently.
        location = f"http://localhost:{self.hub.port}/cdn/{file.path.relative_to(self.hub.root).as_posix()}"
        linked = {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(file.size), "Location": location}
        self.send_bytes(b"", 302, commit | linked)

    def describe(self, found: re.Match[str], query: dict[str, list[str]], body: bytes) -> Any:
        """The API's answer about a repository; `found` is the parsed path."""
        kind, name, what = found["kind"], found["name"], found["what"]
        main = self.repository(kind, name, "main", content=False)
        if what == "discussions":
            return self.discussions(name, self.hub.root / kind / f"{name}@pr", first=query.get("p", ["0"]) == ["0"])
        repository = self.repository(kind, name, unquote(found["revision"] or "main"), content=False)
        if what == "tree":
            return repository.tree(unquote(found["folder"] or "").strip("/"), is_true(query, "recursive"))
        if what == "paths-info":
            is_json = "json" in (self.headers.get("Content-Type") or "")
            wanted = json.loads(body) if is_json else parse_qs(body.decode())
            return [
                repository.entry(path) for path in wanted["paths"] if path in {*repository.files, *repository.folders}
            ]
        if what == "refs":
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": main.commit}
            return {"branches": [branch], "tags": [], "converts": []}
        if what == "commits":  # those of a pull request end with main's
            commits = dict.fromkeys((repository.commit, main.commit))
            return [{"id": commit, "title": "Upload", "message": "", "date": DATE, "authors": []} for commit in commits]
        gated = "manual" if (self.hub.root / kind / name / GATE).is_file() else False
        about = {"id": name, "sha": repository.commit, "private": False, "gated": gated, "disabled": False, "tags": []}
        counts = {"lastModified": DATE, "createdAt": DATE, "downloads": 0, "likes": 0}
        return about | counts | {"siblings": repository.siblings(details=is_true(query, "blobs"))}

    def discussions(self, name: str, pull_request: Path, *, first: bool) -> dict[str, Any]:
        """A page of the list of discussions; only the first one has any."""
        title = "Adding `safetensors` variant of this model"
        about = {"num": 1, "title": title, "status": "open", "isPullRequest": True, "createdAt": DATE, "pinned": False}
        about |= {"author": {"name": "SFconvertbot"}, "repo": {"name": name, "type": "model"}}
        found = [about] if first and pull_request.is_dir() else []
        return {"discussions": found, "count": len(found), "start": 0, "numClosedDiscussions": 0}

    # ------------------------------------------------------------------------- answers

    def send_json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_bytes(json.dumps(content).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def send_file(self, path: Path, headers: dict[str, str], *, large: bool) -> None:
        """Send a file or the range of it that the client asks for."""
        if not path.resolve().is_relative_to(self.hub.root) or not path.is_file():
            raise Refused(404, None, "no such file")
        content = path.read_bytes()
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"} | headers
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            self.send_bytes(content, 200, headers, large=large)
            return
        start, end = asked.groups()
        first = int(start) if start else max(0, len(content) - int(end))
        last = min(int(end), len(content) - 1) if start and end else len(content) - 1
        if first >= len(content):
            self.send_bytes(b"", 416, {"Content-Range": f"bytes */{len(content)}"})
            return
        headers |= {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self.send_bytes(content[first : last + 1], 206, headers, large=large)

    def send_bytes(self, content: bytes, status: int, headers: dict[str, str], *, large: bool = False) -> None:
        """Send an answer at the Hub's rate; a `large` one may break off."""
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if large and 0 < self.hub.break_at < len(content) and self.hub.take_break():
            content, self.close_connection = content[: self.hub.break_at], True
        for chunk in self.hub.chunks(content):
            self.wfile.write(chunk)

    def log_message(self, format: str, *values: Any) -> None:
        """Print nothing: `LocalHub.requests` has them."""


def is_true(query: dict[str, list[str]], key: str) -> bool:
    return query.get(key, ["false"])[0].lower() in ("1", "true")


class Server(ThreadingHTTPServer):
    """The HTTP server: a thread for each connection, all of which end with it."""

    daemon_threads = False  # so that server_close waits for them

    def __init__(self, hub: "LocalHub", port: int) -> None:
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what failed here, not clients that went away."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        for connection in list(self.connections):  # clients keep idle ones open
            with contextlib.suppress(OSError):  # closed meanwhile
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()


# ----------------------------------------------------------------------------- the Hub


class LocalHub:
    """A Hub that answers while the context is open.

    Its faults can be changed while it runs: `delay` is the wait before every answer in seconds, `rate` the speed of
    every body in bytes a second (0: no limit). With `break_at`, the connection ends after that many bytes of a large
    file, `breaks` times (None: every time).

    `requests` are the requests so far, as "GET /api/models/OWNER/NAME?blobs=true"; `on_request` is called with each.
    """

    def __init__(
        self,
        root: Path,
        *,
        port: int = 0,
        rate: float = 0,
        delay: float = 0,
        break_at: int = 0,
        breaks: int | None = None,
        on_request: Callable[[str], None] | None = None,
    ) -> None:
        self.root = root.resolve()
        self.rate, self.delay, self.break_at, self.breaks = rate, delay, break_at, breaks
        self.requests: list[str] = []
        self.on_request = on_request
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.server = Server(self, port)
        self.port: int = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """The variables of a process that uses this Hub and keeps its cache and token in `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home)}

    def record(self, request: str) -> None:
        with self.lock:
            self.requests.append(request)
            if self.on_request:
                self.on_request(request)

    def take_break(self) -> bool:
        """Whether one more answer breaks off; counts it."""
        with self.lock:
            if self.breaks is None:
                return True
            taken = self.breaks > 0
            self.breaks -= taken
            return taken

    def pause(self, seconds: float) -> None:
        """Wait, but no longer than the Hub runs."""
        self.stopping.wait(seconds)

    def chunks(self, content: bytes) -> Iterator[bytes]:
        """Parts of a body, each followed by the time that it takes at the present rate."""
        sent, due = 0, time.monotonic()
        while sent < len(content):
            chunk = content[sent : sent + (max(1, int(self.rate / 10)) if self.rate else CHUNK_BYTES)]
            yield chunk
            sent += len(chunk)
            if self.rate:
                due += len(chunk) / self.rate
                self.pause(max(0, due - time.monotonic()))


def main() -> None:
    """Serve until interrupted, one printed line a request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--rate", type=float, default=0, metavar="BYTES_PER_S", help="speed of every body")
    parser.add_argument("--delay", type=float, default=0, metavar="S", help="wait before every answer")
    parser.add_argument("--break-at", type=int, default=0, metavar="BYTES", help="end the connection after so many")
    parser.add_argument("--breaks", type=int, metavar="N", help="how often it breaks off (default: always)")
    options = vars(parser.parse_args())
    with contextlib.suppress(KeyboardInterrupt), LocalHub(**options, on_request=print_request):
        threading.Event().wait()


def print_request(request: str) -> None:
    print(time.strftime("%H:%M:%S"), request, flush=True)


if __name__ == "__main__":
    main()
