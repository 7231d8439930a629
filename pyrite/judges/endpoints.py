"""A chat completion from an OpenAI-compatible server: one request, one reply, or the kind of trouble there was."""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

# refused: not answered, for now; lost: maybe answered, and paid for; unusable: answered, but not a completion;
# rejected: this request cannot be answered; system: not with a system turn; fatal: no request can be answered
Kind = Literal["refused", "lost", "unusable", "rejected", "system", "fatal"]
CHUNK = 1 << 16
SAID = 200  # characters of a server's own words in a message
# how servers say that a model takes no system turn: "System role not supported" (vLLM, TGI and llama.cpp with Gemma),
# "Developer instruction is not enabled" (Google), "role does not support 'system'" (OpenAI), 'Unexpected role "system"'
# (Anthropic), "Only user and assistant roles are supported", "Conversation roles must alternate" (Mistral)
_SYSTEM = re.compile(
    r"(?:system|developer)\W{0,3}(?:role|message|prompt|instruction|turn|field|param)|\brole.{0,40}\b(?:system|developer)\b",
    re.IGNORECASE,
)
_NOT = re.compile(r"\bnot\b|n't\b|\bno\b|unsupported|unknown|invalid|unexpected|disabled|forbidden", re.IGNORECASE)
_ROLES = re.compile(
    r"only user(?:,| and) assistant\b|roles must (?:strictly )?alternate|must start with .{0,9}user\b", re.I
)


class Trouble(Exception):  # noqa: N818, most of it passes
    """No completion; wait: seconds the server asked to be left alone."""

    def __init__(self, kind: Kind, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.wait = wait


class Completion(NamedTuple):
    """What a model wrote; tokens where the server counts them, their log-probabilities where it offers them."""

    text: str
    cut: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    tokens: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Endpoint:
    """A server at `base_url`, which may want the key in the environment variable `key_env`; timeout in seconds.

    The key is read for each request, is sent to this address only, and appears in no message. Raises ValueError for
    an address that cannot be one, or that holds a password.
    """

    base_url: str = "https://api.openai.com/v1"
    key_env: str = "OPENAI_API_KEY"
    timeout: float = 60.0

    def __post_init__(self) -> None:
        url = urllib.parse.urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"base_url is {self.base_url!r}; give an address such as http://127.0.0.1:8000/v1")
        if url.password or url.username or url.query:
            raise ValueError("base_url holds more than an address; a key belongs into the environment (key_env)")
        if not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout}; give seconds, more than 0")

    def complete(self, body: dict[str, Any]) -> Completion:
        """The completion of a request body. Raises Trouble."""
        key = self._key()
        try:
            raw = self._posted(body, key)
        except urllib.error.HTTPError as error:
            raise self._refusal(error, key) from None
        except urllib.error.URLError as error:
            never = isinstance(error.reason, (ConnectionRefusedError, socket.gaierror))
            raise Trouble("refused" if never else "lost", f"no connection: {error.reason}") from None
        except TimeoutError:
            raise Trouble("lost", f"no answer within {self.timeout:g} seconds") from None
        except (OSError, http.client.HTTPException) as error:
            raise Trouble("lost", f"the connection was cut ({type(error).__name__})") from None
        return _completion(_hidden(raw.decode("utf-8", "replace"), key))

    def _key(self) -> str:
        key = os.environ.get(self.key_env, "").strip()
        if not key.isascii() or not key.isprintable():
            raise Trouble("fatal", f"the key in {self.key_env} holds characters that no header can carry; set it again")
        return key

    def _posted(self, body: dict[str, Any], key: str) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        until = time.monotonic() + self.timeout
        with self._opener().open(request, timeout=self.timeout) as response:
            parts = []
            while part := response.read1(CHUNK):  # a timeout of the socket alone would let a slow server drip on
                parts.append(part)
                if time.monotonic() > until:
                    raise TimeoutError
            if response.length:  # read1 does not mind an end before the promised length
                raise http.client.IncompleteRead(b"", response.length)
            return b"".join(parts)

    def _opener(self) -> urllib.request.OpenerDirector:
        here = urllib.parse.urlsplit(self.base_url).hostname in ("localhost", "127.0.0.1", "::1")
        return urllib.request.build_opener(_Stay, *([urllib.request.ProxyHandler({})] if here else []))

    def _refusal(self, error: urllib.error.HTTPError, key: str) -> Trouble:
        """What a status other than 200 means."""
        status = error.code
        try:
            said = _hidden(" ".join(error.read(CHUNK).decode("utf-8", "replace").split()), key)
        except (OSError, http.client.HTTPException):
            said = ""
        message = f"{self.base_url} answered {status}: {said[:SAID] or error.reason}"
        if status == 429 and "insufficient_quota" in said:
            return Trouble("fatal", f"{message}; the account has no money left")
        if status in (400, 422, 500) and _no_system(said):
            return Trouble("system", message)
        if status in (408, 409, 425, 429) or status >= 500:
            return Trouble("refused", message, _wait(error.headers.get("Retry-After")))
        if status in (400, 413, 422):
            return Trouble("rejected", message)
        hint = {401: f"check the key in {self.key_env}", 403: f"check the key in {self.key_env}"}
        return Trouble("fatal", f"{message}; {hint.get(status, 'check the address and the name of the model')}")


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows nobody elsewhere with a key in hand."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


def _no_system(said: str) -> bool:
    """Whether a server's words say that the model takes no system turn."""
    sentences = re.split(r"[.;!?]\s", said)
    return bool(_ROLES.search(said)) or any(_SYSTEM.search(one) and _NOT.search(one) for one in sentences)


def _completion(raw: str) -> Completion:
    try:
        found = json.loads(raw)
        choice = found["choices"][0]
        text = choice["message"].get("content") or ""
        usage = found.get("usage") or {}
        tokens = (choice.get("logprobs") or {}).get("content") or None
        asked, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if not (isinstance(text, str) and isinstance(asked, int | None) and isinstance(written, int | None)):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise Trouble("unusable", f"the answer is no chat completion: {raw[:SAID]!r}") from None
    return Completion(text, choice.get("finish_reason") == "length", asked, written, tokens)


def _wait(header: str | None) -> float:
    """Seconds of a Retry-After, a number or a date; 0 without one."""
    if not header:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0


def _hidden(text: str, key: str) -> str:
    """The text without the key, should a server repeat it; a key too short to be a secret is none."""
    return text.replace(key, "[key]") if len(key) >= 8 else text
