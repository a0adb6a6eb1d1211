"""A directory served over HTTP on loopback, with as much of S3 as boto3 needs, and of a hub as huggingface_hub.

It can be made to fail.

`http://HOST:PORT/BUCKET/KEY` is the file DIRECTORY/BUCKET/KEY, so a pack in it can be read by http:// and by s3://.
"""

from __future__ import annotations

import hashlib
import io
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.sax.saxutils import escape

ACCESS = {  # of the environment, so that boto3 asks nobody else
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class ObjectServer(ThreadingHTTPServer):
    """Serves `directory`; `requests` lists "METHOD path" of all that came, answered well or not."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, directory: Path, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.directory = directory
        self.requests: list[str] = []
        self._failures = 0
        self._status = 503
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """http://127.0.0.1:PORT, also the S3 endpoint."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes boto3 and streaming talk to this server for s3:// addresses."""
        return {**ACCESS, "S3_ENDPOINT_URL": self.url, "AWS_ENDPOINT_URL": self.url}

    def fail_next(self, requests: int, status: int = 503) -> None:
        """Answer the next `requests` requests with `status`; 0 in place of a status cuts the body in the middle."""
        with self._lock:
            self._failures, self._status = requests, status

    def take_failure(self) -> int | None:
        """The status that the present request must fail with, or None."""
        with self._lock:
            if self._failures == 0:
                return None
            self._failures -= 1
            return self._status


@contextmanager
def object_server(directory: Path, port: int = 0) -> Iterator[ObjectServer]:
    """A running server, stopped at the end of the block."""
    server = ObjectServer(directory, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: ObjectServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        cut = self._refused()
        if cut is None:
            return
        path, query = self._target()
        if "list-type" in query:
            self._answer(200, self._listing(path, query.get("prefix", [""])[0]))
        elif not path.is_file():
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            content, size = path.read_bytes(), path.stat().st_size
            status, headers = 200, {}
            if "Range" in self.headers:
                first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
                content = content[int(first) : int(last or size) + 1]
                status, headers = 206, {"Content-Range": f"bytes {first}-{int(first) + len(content) - 1}/{size}"}
            self._answer(status, content, headers, cut)

    def do_HEAD(self) -> None:
        if self._refused() is None:
            return
        path, _ = self._target()
        if path.is_dir():
            self._answer(200)
        elif path.is_file():
            self._answer(200, path.read_bytes())
        else:
            self._answer(404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            content = _unchunked(io.BytesIO(content))
        if self._refused() is None:
            return
        path, _ = self._target()
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{threading.get_ident()}")
        aside.write_bytes(content)
        aside.replace(path)
        self._answer(200, headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def do_DELETE(self) -> None:
        if self._refused() is None:
            return
        self._target()[0].unlink(missing_ok=True)
        self._answer(204)

    def _refused(self) -> bool | None:
        """None where the request was made to fail; else whether its body must be cut."""
        self.server.requests.append(f"{self.command} {self.path}")
        status = self.server.take_failure()
        if status:
            self._answer(status, b"<Error><Code>SlowDown</Code></Error>")
            return None
        return status == 0

    def _target(self) -> tuple[Path, dict[str, list[str]]]:
        parts = urllib.parse.urlsplit(self.path)
        path = (self.server.directory / urllib.parse.unquote(parts.path).lstrip("/")).resolve()
        assert path.is_relative_to(self.server.directory.resolve())
        return path, urllib.parse.parse_qs(parts.query, keep_blank_values=True)

    def _listing(self, bucket: Path, prefix: str) -> bytes:
        files = sorted(path for path in bucket.rglob("*") if path.is_file())
        keys = [path.relative_to(bucket).as_posix() for path in files]
        found = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{(bucket / key).stat().st_size}</Size></Contents>"
            for key in keys
            if key.startswith(prefix)
        )
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><IsTruncated>false</IsTruncated>'
            f"{found}</ListBucketResult>"
        ).encode()

    def _answer(
        self, status: int, content: bytes = b"", headers: dict[str, str] | None = None, cut: bool | None = False
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        hub = {"X-Repo-Commit": "0" * 40, **({"X-Error-Code": "EntryNotFound"} if status == 404 else {})}
        for name, value in {"ETag": f'"{hashlib.md5(content).hexdigest()}"', **hub, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True


def _unchunked(body: io.BytesIO) -> bytes:
    """The content of a body in AWS's chunks: a size in hexadecimal, the bytes, and so on to a size of 0."""
    content = b""
    while size := int(body.readline().split(b";")[0], 16):
        content += body.read(size)
        body.readline()
    return content
