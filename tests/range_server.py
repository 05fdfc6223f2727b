"""An HTTP server on loopback for a folder of files: with ranges of bytes or without, and failing on request."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class RangeServer:
    """Serve a folder while the context is open.

    Attributes:
        ranges: Whether ranges of bytes are honoured; otherwise every answer is a whole file.
        failures: How many of the next requests are answered by `status`.
        requests: `(method, path, range or None)` of all that was asked for, in order.
        body_bytes: How many bytes of content were sent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges, self.failures, self.status = True, 0, 503
        self.requests: list[tuple[str, str, str | None]] = []
        self.body_bytes = 0
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> RangeServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def asked_for(self, name: str) -> list[str | None]:
        """The ranges that were asked of a file."""
        return [asked for method, path, asked in self.requests if method == "GET" and path.endswith(name)]


class _Handler(BaseHTTPRequestHandler):
    owner: RangeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing: the test's output is not a server log."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        owner, path = self.owner, unquote(urlsplit(self.path).path)
        with owner.lock:
            owner.requests.append((self.command, path, self.headers.get("Range")))
            failing = owner.failures > 0
            owner.failures -= failing
        target = owner.folder / path.strip("/")
        if failing:
            return self._send(owner.status, b"not now")
        if target.is_dir():
            links = "".join(f'<a href="{item.name}">{item.name}</a>\n' for item in sorted(target.iterdir()))
            return self._send(200, links.encode(), {"Content-Type": "text/html"})
        if not target.is_file():
            return self._send(404, b"no such file")
        content = target.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not (asked and owner.ranges):
            return self._send(200, content)
        first, last = int(asked[1]), int(asked[2] or len(content))
        if first >= len(content):
            return self._send(416, b"beyond the end")
        part = content[first : last + 1]
        where = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        return self._send(206, part, {"Content-Range": where, "Accept-Ranges": "bytes"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with self.owner.lock:
                self.owner.body_bytes += len(content)
            self.wfile.write(content)
