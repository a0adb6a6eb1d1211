"""A hub of models on loopback: as much of its HTTP as huggingface_hub needs to make, fill and read a repository.

It can ask for a token, and can be made to refuse. What was pushed lies in `files`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LARGE = (".safetensors", ".bin", ".model")  # sent by the protocol of Git LFS, as the hub asks for it


class Hub(ThreadingHTTPServer):
    """`files` maps a repository's name to path -> content, `private` lists those made private.

    `requests` lists "METHOD path" of all that came. `token`: what those who write must show; `refuse`: a status for all
    requests to write.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, token: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.refuse: int | None = None
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: list[str] = []
        self.requests: list[str] = []
        self.objects: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        """What HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, name: str, folder: Path) -> None:
        """Have the repository `name` hold a folder's files."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        self.files[name] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def commit(self, name: str) -> str:
        """The commit of what the repository holds now."""
        digest = hashlib.sha1(name.encode())
        for path, content in sorted(self.files[name].items()):
            digest.update(path.encode() + content)
        return digest.hexdigest()


@contextmanager
def hub_stand_in(token: str = "hf_test") -> Iterator[Hub]:
    """A running hub, stopped at the end of the block."""
    hub = Hub(token)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = self._path()
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name not in self.server.files:
                return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            files = [{"rfilename": file, "type": "file", "path": file} for file in sorted(self.server.files[name])]
            if "tree" in parts:
                return self._json([file | {"size": 0, "oid": "0" * 40} for file in files])
            return self._json({"id": name, "modelId": name, "sha": self.server.commit(name), "siblings": files})
        if len(parts) >= 5 and parts[2] == "resolve":
            return self._file("/".join(parts[:2]), "/".join(parts[4:]))
        return self._json({"error": f"no such page: {path}"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = self._path()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self._json({"error": "Invalid credentials"}, 401)
        if self.server.refuse is not None:
            return self._json({"error": "refused"}, self.server.refuse)
        if path == "/api/validate-yaml":
            return self._json({"warnings": [], "errors": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            self.server.files.setdefault(name, {})
            self.server.private += [name] if asked.get("private") else []
            return self._json({"url": f"{self.server.url}/{name}", "name": name})
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            answers = [{"path": f["path"], "uploadMode": modes[f["path"].endswith(LARGE)]} for f in files]
            return self._json({"files": [answer | {"shouldIgnore": False} for answer in answers]})
        if path.endswith("/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.server.url}/objects/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if path.endswith("/commit/main"):
            name = "/".join(path.split("/")[3:5])
            for line in body.splitlines():
                self._store(name, json.loads(line))
            url = f"{self.server.url}/{name}/commit/{self.server.commit(name)}"
            return self._json({"success": True, "commitOid": self.server.commit(name), "commitUrl": url})
        return self._json({"error": f"no such page: {path}"}, 404)

    def do_PUT(self) -> None:
        oid = self._path().rpartition("/")[2]
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.objects[oid] = content
        self._answer(200, b"")

    def _store(self, name: str, line: dict[str, Any]) -> None:
        value = line["value"]
        if line["key"] == "file":
            self.server.files[name][value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            self.server.files[name][value["path"]] = self.server.objects[value["oid"]]

    def _file(self, name: str, file: str) -> None:
        content = self.server.files.get(name, {}).get(file)
        if content is None:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.server.commit(name)}
        return self._answer(200, content, headers)

    def _path(self) -> str:
        self.server.requests.append(f"{self.command} {self.path}")
        return urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
