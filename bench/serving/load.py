"""A mix of requests about videos, and what each of them waits for."""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.serving.server import chat


@dataclass(frozen=True)
class Answered:
    """One request, as its client saw it."""

    first_s: float  # to its first token
    total_s: float
    prompt_tokens: int
    answer_tokens: int

    @property
    def per_token_s(self) -> float | None:
        """Seconds from token to token, behind the first; None for an answer of one token."""
        return (self.total_s - self.first_s) / (self.answer_tokens - 1) if self.answer_tokens > 1 else None


@dataclass(frozen=True)
class Load:
    """A number of requests, of which some are about a video that was asked about before."""

    answered: Sequence[Answered]
    seconds: float
    peak_cache: float  # fraction of the blocks of the KV cache that were in use at the same time


def mix(videos: Sequence[Path], questions: Sequence[str], count: int, answer: int, seed: int) -> list[dict[str, Any]]:
    """Requests about videos drawn at random, so that most come again with another question.

    Args:
        videos: files, short and long.
        questions: texts.
        count: how many requests.
        answer: tokens of each answer.
        seed: of the draw.
    """
    draw = random.Random(seed)
    return [
        chat([draw.choice(videos)], draw.choice(questions), max_tokens=answer, ignore_eos=True, logprobs=False)
        | {"top_logprobs": None, "stream": True, "stream_options": {"include_usage": True}}
        for _ in range(count)
    ]


def run(address: str, requests: Sequence[dict[str, Any]], concurrency: int) -> Load:
    """Send the requests, `concurrency` at a time, each as soon as another is answered."""
    done, peak = threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], cache_in_use(address))

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    try:
        with ThreadPoolExecutor(concurrency) as pool:
            answered = list(pool.map(lambda request: _ask(address, request), requests))
    finally:
        done.set()
        watcher.join()
    return Load(answered, time.perf_counter() - begin, peak[0])


def metric(address: str, name: str) -> float:
    """A metric of the server, added up over its labels.

    Raises:
        KeyError: the server has no such metric.
    """
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    found = [float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].partition(" ")[0] == name]
    if not found:
        raise KeyError(name)
    return sum(found)


def cache_in_use(address: str) -> float:
    """Fraction of the blocks of the KV cache that requests hold."""
    return metric(address, "vllm:kv_cache_usage_perc")


def _ask(address: str, request: dict[str, Any]) -> Answered:
    body = json.dumps(request).encode()
    asked = urllib.request.Request(f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"})
    begin, first, usage = time.perf_counter(), None, None
    with urllib.request.urlopen(asked, timeout=600) as lines:
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            part = json.loads(line.removeprefix(b"data: "))
            if first is None and part["choices"] and part["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - begin
            usage = part.get("usage") or usage
    total = time.perf_counter() - begin
    if first is None or usage is None:
        raise ValueError(f"bench.serving: an answer must have tokens, got none to {request['messages']}")
    return Answered(first, total, usage["prompt_tokens"], usage["completion_tokens"])
