"""The measuring page's server: on 127.0.0.1 only, on a free port, and below a random path that a stranger on the same machine does not know.

    GET  /TOKEN/page/...    the page            POST /TOKEN/said       what it has to say, one JSON document each
    GET  /TOKEN/ort/...     onnxruntime-web     POST /TOKEN/beat       that it is there
    GET  /TOKEN/files/...   what was pushed     POST /TOKEN/files/...  an output of a model
"""
from __future__ import annotations

import http.server
import json
import queue
import secrets
import shutil
import sys
import threading
import time
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".mjs": "text/javascript; charset=utf-8",
         ".wasm": "application/wasm", ".json": "application/json"}
ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp", "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
"""Without the first two a page has no threads and a clock of 100 us."""
LARGEST = 1 << 30
"""Bytes of one output."""
CHUNK = 1 << 20


class Site:
    """A server with what the page said to it. `folders`: name in the path -> folder here."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.token, self.folders = secrets.token_urlsafe(24), {name: folder.resolve() for name, folder in folders.items()}
        self.said: queue.Queue[dict[str, Any]] = queue.Queue()
        self.heard = time.monotonic()
        """When the page was last heard of."""
        site = self

        class Handler(_Handler):
            at = site

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}/{self.token}/"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def file(self, path: str) -> Path | None:
        """What `folder/name` of an address stands for, whether or not it exists; None for anything outside of the folders."""
        name, _, rest = path.partition("/")
        parts = PurePosixPath(rest).parts
        if name not in self.folders or not rest or "\0" in rest or rest.startswith("/") or ".." in parts:
            return None
        found = self.folders[name].joinpath(*parts)
        return found if found.resolve().is_relative_to(self.folders[name]) else None


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that is killed leaves connections broken off: that is nothing to print."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    at: Site
    protocol_version = "HTTP/1.1"
    timeout = 60  # of a connection that says nothing

    def do_GET(self) -> None:
        path = self._path()
        if path is None:
            return
        file = self.at.file(path)
        if file is None or not file.is_file():
            return self._answer(404)
        with open(file, "rb") as content:
            self._answer(200, length=file.stat().st_size, kind=TYPES.get(file.suffix, "application/octet-stream"))
            try:
                shutil.copyfileobj(content, self.wfile, CHUNK)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the page went away

    def do_POST(self) -> None:
        path = self._path()
        if path is None:
            return
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            return self._refuse(411)
        if not 0 <= length <= LARGEST:
            return self._refuse(413)
        body = self.rfile.read(length)
        if len(body) < length:
            return self._refuse(400)
        self.at.heard = time.monotonic()
        self._answer(self._take(path, body))

    def _take(self, path: str, body: bytes) -> int:
        if path == "beat":
            return 204
        if path == "said":
            try:
                told = json.loads(body)
                self.at.said.put({str(k): v for k, v in told.items()})
            except (ValueError, AttributeError):
                return 400
            return 204
        file = self.at.file(path) if path.startswith("files/") else None
        if file is None or not file.parent.is_dir() or file.is_dir():
            return 404
        file.write_bytes(body)
        return 204

    def _path(self) -> str | None:
        """The address below the token; None after refusing one without it."""
        path = unquote(urlsplit(self.path).path)
        _, token, rest = (path.split("/", 2) + ["", ""])[:3]
        if not secrets.compare_digest(token.encode(), self.at.token.encode()):
            self._refuse(403)
            return None
        return rest

    def _refuse(self, status: int) -> None:
        self.close_connection = True  # whatever it was sending is not read
        self._answer(status)

    def _answer(self, status: int, *, length: int = 0, kind: str = "text/plain") -> None:
        self.send_response(status)
        for name, value in {**ISOLATED, "Content-Type": kind, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what matters is told by the page."""
