"""A chat model behind an OpenAI-compatible endpoint, such as vLLM, SGLang, TGI, Ollama or a hosted API."""

from __future__ import annotations

import email.utils
import http.client
import json
import random
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_FATAL = (401, 403, 404, 405)  # no request will do better
_LONGEST_PAUSE = 120.0


class EndpointError(RuntimeError):
    """An endpoint gave no usable reply to one request."""


class RefusedError(ValueError):
    """An endpoint will reply to no request, because of its address, the key or the name of the model."""


@dataclass(frozen=True)
class Endpoint:
    """Sends messages to `URL/chat/completions`.

    Timeouts, broken connections, replies that are no JSON and the codes 408, 409, 425, 429 and 5xx are tried again
    after a growing pause, or the one that the endpoint asks for.

    Args:
        url: up to and including its version: "http://localhost:8000/v1".
        model: name of the model there.
        key: API key; None for none.
        parameters: other fields of a request.
        timeout: seconds to wait for a reply.
        attempts: how often to try, at least 1.
        pause: seconds before the second attempt; it doubles with each.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    parameters: tuple[tuple[str, Any], ...] = (("temperature", 0),)
    timeout: float = 300.0
    attempts: int = 6
    pause: float = 1.0

    def __call__(self, content: str | list[dict[str, Any]]) -> str:
        """The reply to one message of a user.

        Raises:
            EndpointError: there is no usable reply after all attempts, or the endpoint refuses this request.
            RefusedError: it would refuse any request.
        """
        messages = [{"role": "user", "content": content}]
        body = json.dumps({"model": self.model, "messages": messages, **dict(self.parameters)}).encode()
        for attempt in range(self.attempts):
            try:
                return _text(self._send(body))
            except urllib.error.HTTPError as error:
                reason, wait = _reason(error), _asked_pause(error)
                if error.code in _FATAL or 300 <= error.code < 400:
                    raise RefusedError(
                        f"labels: '{self.url}' must accept requests for '{self.model}': {reason}"
                    ) from None
                if error.code not in _AGAIN:
                    raise EndpointError(f"'{self.url}' refused a request: {reason}") from None
            except (OSError, http.client.HTTPException, _UnusableError) as error:  # timeouts are OSErrors
                reason, wait = f"{type(error).__name__}: {error}", None
            if attempt + 1 < self.attempts:
                grown = self.pause * 2**attempt * random.uniform(0.75, 1.25)
                time.sleep(min(grown if wait is None else wait, _LONGEST_PAUSE))
        raise EndpointError(f"'{self.url}' gave no usable reply in {self.attempts} attempts: {reason}")

    def _send(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "fftriton"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        with _OPENER.open(request, timeout=self.timeout) as response:
            return response.read()


class _UnusableError(Exception):
    """A reply that is no chat completion."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirection would send the key elsewhere, and the request without its body."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def _text(data: bytes) -> str:
    try:
        choice = json.loads(data)["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _UnusableError(f"the reply is no chat completion: {data[:200]!r}") from None
    if not isinstance(text, str) or not text.strip():
        raise _UnusableError(f"the reply has no text, but {str(text)[:40]!r}")
    if reason == "length":
        raise EndpointError("the reply was cut off at its maximum length")
    return text


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        detail = error.read(500).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException):
        detail = ""
    return " ".join(f"HTTP {error.code} {error.reason}: {detail}".split())


def _asked_pause(error: urllib.error.HTTPError) -> float | None:
    """Seconds that the endpoint asks to wait, by number or by date."""
    asked = error.headers.get("Retry-After", "")
    try:
        return max(0.0, float(asked))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
