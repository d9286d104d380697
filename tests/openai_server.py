"""A small server with OpenAI's chat completions API, of the standard library; it can misbehave."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Reply = str | dict[str, Any] | tuple[int, str] | bytes
"""A content, a whole message, a status with a body, or a response as it goes over the wire."""


class Server:
    """`reply(body, number)` answers request `number`; `bodies` and `heads` have what was asked."""

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply]):
        self.reply, self.bodies, self.url = reply, [], ""
        self.heads: list[tuple[str, str | None]] = []  # paths and keys
        self.busy = self.most = 0
        self.lock = threading.Lock()


@contextlib.contextmanager
def serving(reply: Callable[[dict[str, Any], int], Reply]) -> Iterator[Server]:
    """Serve on the loopback until the block ends, without the proxies of this machine."""
    server = Server(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                number = len(server.bodies)
                server.bodies.append(body)
                server.heads.append((self.path, self.headers.get("Authorization")))
                server.busy += 1
                server.most = max(server.most, server.busy)
            try:
                found = server.reply(body, number)
            finally:
                with server.lock:
                    server.busy -= 1
            if isinstance(found, bytes):
                self.wfile.write(found)
                return
            if isinstance(found, tuple):
                status, text = found
            else:
                status = 200
                message = {"content": found} if isinstance(found, str) else found
                message = {"role": "assistant", **message}
                text = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]})
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

        def do_GET(self):
            server.heads.append((self.path, self.headers.get("Authorization")))
            self.send_error(404)

        def log_message(self, *args):
            pass

    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http,
        pytest.MonkeyPatch.context() as environment,
    ):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            environment.delenv(name, raising=False)
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        server.url = f"http://127.0.0.1:{http.server_port}/v1"
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
