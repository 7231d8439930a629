"""A toy judge on loopback that fails as real servers do: its verdict comes from the texts, its faults are drawn.

`Server(...)` runs one in this process; as a script it is a process of its own, which tests kill and start again. Its
log has a line for every request it would charge for, written before the answer leaves.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CASE = re.compile(r"<answer_A>\n(.*?)\n</answer_A>\n<answer_B>\n(.*?)\n</answer_B>", re.DOTALL)
FAULTS = ("429", "500", "503", "slow", "cut", "malformed", "label", "empty")
PATIENCE = 0.5  # seconds a client waits where it should meet a slow server
SLOW = 0.8


def truth(a: str, b: str) -> str:
    """The judge's verdict: the answer of more words, a tie where both have as many."""
    longer = len(a.split()) - len(b.split())
    return "A" if longer > 0 else "B" if longer < 0 else "TIE"


def tokens(text: str) -> int:
    """What the toy counts as tokens."""
    return len(text.split())


class Judge(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_POST(self) -> None:
        """Answer, or fail in the way that was drawn."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()
        fault = self.server.draw(name, body, self)
        cases = CASE.findall(body["messages"][-1]["content"])
        text = "\n".join(truth(a, b) for a, b in cases)
        if fault == "refuse":
            return
        if self.server.no_system and body["messages"][0]["role"] == "system":
            status, words = self.server.no_system
            self.reply(status, words.encode())
            return
        if fault in ("429", "500", "503"):
            self.reply(int(fault), b'{"error": {"message": "not now"}}', {"Retry-After": "0.02"})
            return
        if fault == "quota":
            self.reply(429, b'{"error": {"code": "insufficient_quota"}}', {"Retry-After": "1"})
            return
        if fault in ("401", "404", "400"):
            self.reply(int(fault), json.dumps({"error": {"message": f"no: {self.headers['Authorization']}"}}).encode())
            return
        if fault == "slow":
            time.sleep(SLOW)
        text = {"label": "Both have their merits. A is short.", "empty": ""}.get(fault, self.server.words(body, text))
        whole = json.dumps(self.server.completion(body, text)).encode()
        self.server.charge(fault or "answered", name)
        if fault == "malformed":
            whole = whole[: len(whole) // 2]
        self.reply(200, whole, cut=fault == "cut")

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, cut: bool = False) -> None:
        """Send it, half of it where it is to be cut."""
        try:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if cut else body)
        except OSError:
            pass  # the client has gone
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""


class Server(ThreadingHTTPServer):
    """The toy judge; `share` of the requests fail, by their messages, how often they came, and `seed`.

    always: one fault for all. no_system: status and words that refuse a request with a system turn. odds:
    log-probabilities of labels that it offers. usage: whether it counts tokens.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *, port: int = 0, log: Path | None = None, share: float = 0.0, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Judge)
        self.log, self.share, self.seed = log, share, seed
        self.always = ""
        self.no_system: tuple[int, str] | None = None
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.times: list[float] = []
        self.came: Counter[str] = Counter()
        self.charged: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.usage = True
        self.odds: dict[str, float] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> Server:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def draw(self, name: str, body: dict[str, Any], request: Judge) -> str:
        """The fault of a request, "" for none."""
        with self.lock:
            self.bodies.append(body)
            self.keys.add(request.headers["Authorization"])
            self.times.append(time.monotonic())
            self.came[name] += 1
            number = self.came[name]
        if self.always:
            return self.always
        drawn = hashlib.sha256(f"{self.seed} {number} {name}".encode()).digest()
        if int.from_bytes(drawn[:4], "big") / 2**32 >= self.share:
            return ""
        return FAULTS[drawn[4] % len(FAULTS)]

    def words(self, body: dict[str, Any], text: str) -> str:
        """The verdict in the form that was asked for."""
        return json.dumps({"verdict": text}) if "response_format" in body else text

    def completion(self, body: dict[str, Any], text: str) -> dict[str, Any]:
        """As OpenAI's servers have it."""
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}}
        choice["finish_reason"] = "stop"
        if body.get("logprobs") and self.odds is not None:
            top = [{"token": token, "logprob": logprob} for token, logprob in self.odds.items()]
            choice["logprobs"] = {"content": [{"token": text, "logprob": self.odds[text], "top_logprobs": top}]}
        found: dict[str, Any] = {"object": "chat.completion", "model": body["model"], "choices": [choice]}
        read = sum(tokens(turn["content"]) for turn in body["messages"])
        return found | ({"usage": {"prompt_tokens": read, "completion_tokens": tokens(text)}} if self.usage else {})

    def charge(self, what: str, name: str) -> None:
        """Note what it has charged for."""
        with self.lock:
            self.charged[what] += 1
        if self.log:
            file = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(file, f"{what} {name}\n".encode())
            os.close(file)


def started(port: int, log: Path, *, share: float, seed: int = 0) -> subprocess.Popen[bytes]:
    """A server process that answers at the port; kill it as you like."""
    command = [sys.executable, __file__, str(port), str(log), str(share), str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


if __name__ == "__main__":
    toy = Server(port=int(sys.argv[1]), log=Path(sys.argv[2]), share=float(sys.argv[3]), seed=int(sys.argv[4]))
    os.write(1, b"ready\n")
    toy.serve_forever(poll_interval=0.02)
