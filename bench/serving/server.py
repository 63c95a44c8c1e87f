"""A server of vLLM in a process of its own, and requests to it."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_S = 600


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def serving(folder: Path, overrides: dict[str, Any] | None, log: Path, *more: str, **environment: str) -> Iterator[str]:
    """The address of a server of a checkpoint.

    Raises:
        RuntimeError: the server ends before it answers; the message is what it has logged.
    """
    port = free_port()
    words = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port),
        "--host", "127.0.0.1", "--served-model-name", "model", *more,
    ]  # fmt: skip
    if overrides is not None:
        words += ["--hf-overrides", json.dumps(overrides)]
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    defaults = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB; a GPU has no use for it
    settings = defaults | inherited | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | environment
    with log.open("w") as lines, subprocess.Popen(words, stdout=lines, stderr=lines, env=settings) as process:
        try:
            _wait(process, port, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(log.read_text())
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise RuntimeError(f"no answer within {START_S} s: {log.read_text()}")


def post(address: str, path: str, body: Any) -> tuple[int, Any]:
    """The status and the JSON of the answer."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def chat(videos: list[Path], question: str, **more: Any) -> dict[str, Any]:
    """A request for one greedy answer about videos."""
    encoded = [base64.b64encode(one.read_bytes()).decode() for one in videos]
    media = [{"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{one}"}} for one in encoded]
    content = [*media, {"type": "text", "text": question}]
    return {
        "model": "model", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 6,
        "logprobs": True, "top_logprobs": 2,
    } | more  # fmt: skip


def text_of(answer: Any) -> str:
    return answer["choices"][0]["message"]["content"]
