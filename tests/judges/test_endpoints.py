"""One request at a time, against a real server that fails in every way."""

from __future__ import annotations

import socket
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep, time

import pytest

from judges.server import PATIENCE, Server
from pyrite.feedback.judges import Endpoint
from pyrite.feedback.ledger import Trouble

BODY = {
    "model": "toy",
    "messages": [{"role": "user", "content": "<answer_A>\nx y\n</answer_A>\n<answer_B>\nz\n</answer_B>"}],
}
KINDS = {"429": "refused", "500": "refused", "503": "refused", "slow": "lost", "cut": "lost", "malformed": "unusable"}
KINDS |= {"refuse": "lost", "400": "rejected", "401": "fatal", "404": "fatal", "quota": "fatal"}
SECRET = "sk-very-secret-9"


def endpoint(server: Server) -> Endpoint:
    return Endpoint(server.url, timeout=PATIENCE)


def trouble(at: Endpoint) -> Trouble:
    with pytest.raises(Trouble) as caught:
        at.complete(BODY)
    return caught.value


def test_a_completion(server: Server) -> None:
    found = Endpoint(server.url).complete(BODY)
    assert (found.text, found.cut, found.prompt_tokens, found.completion_tokens) == ("A", False, 7, 1)
    server.usage = False
    assert Endpoint(server.url).complete(BODY).prompt_tokens is None


@pytest.mark.parametrize("fault", KINDS)
def test_kinds_of_trouble(server: Server, fault: str) -> None:
    server.always = fault
    found = trouble(endpoint(server))
    assert found.kind == KINDS[fault]
    assert found.wait == (0.02 if found.kind == "refused" else 0.0)


def test_texts_without_a_verdict_are_completions(server: Server) -> None:
    server.always = "empty"
    assert Endpoint(server.url).complete(BODY).text == ""


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = trouble(Endpoint(f"http://127.0.0.1:{port}/v1"))
    assert (found.kind, "refused" in str(found)) == ("refused", True)


def test_the_key_is_sent_and_never_said(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    at = Endpoint(server.url, "JUDGE_KEY")
    at.complete(BODY)
    assert server.keys == {f"Bearer {SECRET}"}
    for status in ("400", "401", "404"):
        server.always = status  # these repeat the key in their answer
        found = trouble(at)
        assert "[key]" in str(found)
        assert ("JUDGE_KEY" in str(found)) == (status == "401")
        assert SECRET not in str(found) + repr(found) + repr(at)
    monkeypatch.setenv("JUDGE_KEY", "sk-bad\nkey-\u2603")
    found = trouble(at)
    assert found.kind == "fatal"
    assert "sk-bad" not in str(found)
    monkeypatch.delenv("JUDGE_KEY")
    server.always = ""
    server.keys.clear()
    at.complete(BODY)
    assert server.keys == {None}


def _serve(handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    other = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return other


def test_a_redirect_is_not_followed_with_the_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)

    class Elsewhere(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(307)
            self.send_header("Location", f"{server.url}/chat/completions")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    other = _serve(Elsewhere)
    found = trouble(Endpoint(f"http://127.0.0.1:{other.server_address[1]}"))
    assert (found.kind, server.keys) == ("fatal", set())
    other.shutdown()
    other.server_close()


def test_an_answer_that_drips_is_too_late() -> None:
    class Dripping(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(20):
                try:
                    self.wfile.write(b" ")
                except OSError:
                    return
                sleep(0.05)

        def log_message(self, *_: object) -> None: ...

    other = _serve(Dripping)
    found = trouble(Endpoint(f"http://127.0.0.1:{other.server_address[1]}", timeout=0.25))
    assert (found.kind, "within 0.25 seconds" in str(found)) == ("lost", True)
    other.shutdown()
    other.server_close()


WAITS = {"7": (7, 7), "": (0, 0), "soon": (0, 0), "-1": (0, 0), "in ten minutes": (590, 600), "ten minutes ago": (0, 0)}
DATES = {"in ten minutes": 600, "ten minutes ago": -600}  # seconds from now


@pytest.mark.parametrize("wait", WAITS)
def test_retry_after(wait: str) -> None:
    header = formatdate(time() + DATES[wait], usegmt=True) if wait in DATES else wait

    class Later(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(503)
            if header:
                self.send_header("Retry-After", header)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    other = _serve(Later)
    least, longest = WAITS[wait]
    assert least <= trouble(Endpoint(f"http://127.0.0.1:{other.server_address[1]}")).wait <= longest
    other.shutdown()
    other.server_close()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x/v1", "http://", "http://me:pw@x/v1", "http://x/v1?key=1"])
def test_wrong_addresses(url: str) -> None:
    with pytest.raises(ValueError, match="base_url"):
        Endpoint(url)
    with pytest.raises(ValueError, match="timeout is 0"):
        Endpoint(timeout=0)
