"""A Hugging Face Hub on loopback, with the endpoints that our commands need: one that stops, forges and refuses."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = "mistralai/Mistral-7B-v0.3"
COMMIT = "c" * 40


class FakeHub(ThreadingHTTPServer):
    """Serves `files` as every repository that `errors` does not name.

    Attributes:
        files: content by name; those that end in .safetensors or .v3 are in large file storage.
        errors: HTTP status and the hub's error code by path of the request, such as "/api/models/owner/name".
        forged: names of files that are served with another content than the stated checksum's.
        stop_after: bytes after which a download stops without ending; None: never.
        drop_after: bytes after which the connection is closed; None: never.
        requests: method, path and Range of each request.
        repositories: visibility of those that exist; None: every one does, and is public.
        uploaded: content of the files that were committed, by name.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.errors: dict[str, tuple[int, str]] = {}
        self.forged: set[str] = set()
        self.stop_after: int | None = None
        self.drop_after: int | None = None
        self.requests: list[tuple[str, str, str]] = []
        self.repositories: dict[str, str] | None = None
        self.uploaded: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloaded(self) -> list[tuple[str, str]]:
        """Return the name and the Range of each file that was requested."""
        found = [(re.search(r"/resolve/\w+/(.+)", path), given) for method, path, given in self.requests]
        return [(match[1], given) for match, given in found if match]


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".v3"))


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path, self.headers.get("Range", "")))
        for prefix, (status, code) in self.server.errors.items():
            if path.startswith(prefix):
                return self._answer(status, b"{}", {"X-Error-Code": code})
        if path.startswith("/api/models/"):
            name = path.removeprefix("/api/models/").partition("/revision/")[0]
            if self.server.repositories is not None and name not in self.server.repositories:
                return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return self._answer(200, json.dumps(self._model(name)).encode())
        self._send_file(path.rpartition("/")[2])

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.command, path, ""))
        for prefix, (status, code) in self.server.errors.items():
            if path.startswith(prefix):
                return self._answer(status, b"{}", {"X-Error-Code": code})
        assert self.server.repositories is not None
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.server.repositories:
                return self._answer(409, json.dumps({"url": f"{self.server.url}/{name}"}).encode())
            self.server.repositories[name] = asked["visibility"]
            return self._answer(200, json.dumps({"url": f"{self.server.url}/{name}"}).encode())
        if path == "/api/validate-yaml":  # of a README.md
            return self._answer(200, json.dumps({"errors": [], "warnings": []}).encode())
        if "/preupload/" in path:
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": file["path"], **mode} for file in json.loads(body)["files"]]
            return self._answer(200, json.dumps({"files": files}).encode())
        for line in map(json.loads, body.splitlines()):  # a commit
            if line["key"] == "file":
                self.server.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.server.url}/{path.split('/models/')[1].partition('/commit')[0]}/commit/{COMMIT}"
        self._answer(200, json.dumps({"commitUrl": url, "commitOid": COMMIT, "success": True}).encode())

    def _model(self, name: str) -> dict[str, Any]:
        siblings = []
        for name, content in self.server.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content)}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if is_large(name):
                sha = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        private = (self.server.repositories or {}).get(name) == "private"
        return {"id": name, "sha": COMMIT, "private": private, "siblings": siblings}

    def _send_file(self, name: str) -> None:
        content = self.server.files[name]
        if name in self.server.forged:
            content = bytes(len(content))
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        stop, drop = (self.server.stop_after, self.server.drop_after) if is_large(name) else (None, None)
        self.wfile.write(content[start : stop if drop is None else drop])
        if stop is not None and stop < len(content):
            time.sleep(600)  # the client is killed meanwhile
        self.close_connection = drop is not None

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[FakeHub]:
    with FakeHub(files) as hub:
        threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
        yield hub
        hub.shutdown()


@contextmanager
def only_hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, token_file: Path) -> Iterator[FakeHub]:
    """Serve a hub that huggingface_hub in this process uses, without any token."""
    from huggingface_hub import constants

    with serve(files) as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("{")[2]
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{{template}")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(token_file))
        for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTPS_PROXY", "HTTP_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        yield hub
