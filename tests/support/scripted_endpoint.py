"""An OpenAI-compatible endpoint on the loopback that replies by a script."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

Reply = tuple[int, dict[str, str], bytes] | float | None


def chat(text: Any, **choice: Any) -> Reply:
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}, **choice}]}).encode()


@contextmanager
def endpoint(reply: Callable[[dict[str, Any], int], Reply]):
    """A server on the loopback. `reply` gets the request and its number; a number is seconds to wait, None hangs up."""
    requests: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body | {"path": self.path, "key": self.headers["Authorization"]})
            answer = reply(body, len(requests))
            if isinstance(answer, float):
                time.sleep(answer)
                answer = None
            if answer is None:
                self.close_connection = True
                return
            status, headers, data = answer
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
