"""The fault test: a server that fails three calls in ten in every way, is killed, and so is who asks it.

What must hold: every pair ends with the right verdict or a counted "no verdict"; nothing answered is asked again; and
what was charged more than once for a question is no more than what the ledger calls lost or unusable.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from judges.conftest import Texts, pairs, wanted
from judges.server import FAULTS, PATIENCE, Server, started
from pyrite.data import rows as data
from pyrite.data.files import read
from pyrite.feedback.judges import Form, JudgeOptions, LanguageJudge
from pyrite.feedback.ledger import GoldStopped, Ledger

PAID = {"answered", "slow", "cut", "malformed", "label", "empty"}


def judge(url: str, ledger: Path, **options: object) -> LanguageJudge:
    fast = {"base_url": url, "timeout": PATIENCE, "backoff": 0.05, "concurrency": 16, "price_in": 1.0, "price_out": 1.0}
    return LanguageJudge("toy", "more words", None, JudgeOptions(**{**fast, **options}), str(ledger))  # type: ignore


def right(found: list[float], texts: Texts, none: int) -> bool:
    """Every verdict is the true one, or one of so many that are none."""
    missing = sum(p != p for p in found)
    return missing == none and all(p != p or p == w for p, w in zip(found, wanted(texts), strict=True))


def test_faults_of_every_kind(tmp_path: Path) -> None:
    texts = pairs(150)
    with Server(share=0.3) as server:
        asking = judge(server.url, tmp_path / "j.db")
        found = asking(*texts).tolist()
        charged, sent = Counter(server.charged), len(server.bodies)
        assert asking(*texts).nan_to_num(-1).tolist() == [p if p == p else -1 for p in found]
        assert len(server.bodies) == sent  # a second run makes no call
    with Ledger(tmp_path / "j.db") as ledger:
        books = ledger.books()
    assert set(FAULTS) - {"429", "500", "503"} <= set(charged)
    assert books.answered == 300
    assert right(found, texts, books.no_verdict)  # no pair lost both of its questions
    assert books.calls == sent
    arrived = books.answered + books.unusable
    assert arrived <= sum(charged.values()) <= arrived + books.lost
    assert books.lost >= charged["cut"]
    assert books.unusable + books.no_verdict <= charged["malformed"] + charged["label"] + charged["empty"]


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_dead_judge_and_a_rerun(tmp_path: Path, port: int) -> None:
    texts, url = pairs(60), f"http://127.0.0.1:{port}/v1"
    server = started(port, tmp_path / "log", share=0.3)
    few = judge(url, tmp_path / "j.db")(*pairs(20)).tolist()
    server.kill()
    server.communicate()
    with pytest.raises(GoldStopped, match=r"does not answer: 8 questions in a row .*refused.* run again .*j\.db"):
        judge(url, tmp_path / "j.db", retries=1)(*texts)
    server = started(port, tmp_path / "log", share=0.3, seed=1)
    found = judge(url, tmp_path / "j.db")(*texts).tolist()
    server.kill()
    server.communicate()
    assert [p if p == p else -1 for p in found[:20]] == [p if p == p else -1 for p in few]
    _check_books(tmp_path / "log", tmp_path / "j.db", found, texts)


def _check_books(log: Path, ledger: Path, found: list[float], texts: Texts) -> dict[str, int]:
    """The server's own log against the ledger, question by question."""
    charges: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for line in log.read_text().splitlines():
        what, name = line.split()
        assert what in PAID
        charges[name] += 1
        kinds[what] += 1
    with Ledger(ledger) as opened:
        rows, books = list(opened.rows()), opened.books()
    assert len(rows) == 2 * len(texts[0])
    assert books.failed == 0
    assert right(found, texts, sum(p != p for p in found))
    assert sum(p != p for p in found) <= books.no_verdict  # both questions of a pair may have none
    known = books.answered + books.unusable  # paid answers that arrived
    assert known <= sum(charges.values()) <= known + books.lost
    named = {_server_name(row): row for row in rows}
    for name, times in charges.items():
        row = named[name]
        assert times <= 1 + row["unusable"] + row["lost"]
    return {
        "charged": sum(charges.values()),
        "arrived": known,
        "lost": books.lost,
        "paid_twice": _twice(charges, named),
    }


def _server_name(row: dict) -> str:
    """A question as the server's log names it."""
    messages = Form("more words").messages([(row["prompt"], row["a"], row["b"])])
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()


def _twice(charges: Counter[str], named: dict[str, dict]) -> int:
    """Charges beyond the answers that arrived: paid twice, as far as anybody can know."""
    return sum(max(0, times - 1 - named[name]["unusable"]) for name, times in charges.items())


@pytest.mark.slow
def test_a_thousand_comparisons(tmp_path: Path, port: int) -> None:
    """The server is killed and started again in the middle, and so is who asks, through the command line."""
    texts, ledger, log = pairs(1000), tmp_path / "out" / "ledger.db", tmp_path / "log"
    rows = [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in zip(*texts, strict=True)]
    data.write(rows, tmp_path / "pairs.jsonl")
    command = [sys.executable, "-m", "pyrite", "judge", "ask", "--pairs", str(tmp_path / "pairs.jsonl")]
    command += ["--model", "toy", "--criterion", "more words", "--base-url", f"http://127.0.0.1:{port}/v1"]
    command += [
        "--timeout",
        str(PATIENCE),
        "--backoff",
        "0.1",
        "--concurrency",
        "16",
        "--price-in",
        "1",
        "--price-out",
        "1",
    ]
    command += ["--out", str(tmp_path / "out"), "--retries", "8"]

    def client() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    server, asking = started(port, log, share=0.3), client()
    _until(ledger, 500)
    server.send_signal(signal.SIGKILL)
    server.communicate()
    time.sleep(0.3)
    server = started(port, log, share=0.3, seed=1)
    _until(ledger, 1000)
    os.kill(asking.pid, signal.SIGKILL)
    asking.communicate()
    asking = client()
    said, error = asking.communicate(timeout=300)
    server.kill()
    server.communicate()
    assert asking.returncode == 0, (said + error).decode()
    table = read(str(tmp_path / "out" / "verdicts.parquet")).rows
    assert [(row["prompt"], row["a"], row["b"]) for row in table] == list(zip(*texts, strict=True))
    found = [float("nan") if row["p"] is None else row["p"] for row in table]
    assert [row["preference"] for row in table] == [{1.0: 1, 0.0: 2, 0.5: 0}.get(p) for p in found]
    figures = _check_books(log, ledger, found, texts)
    assert figures["lost"] > 0
    assert figures["paid_twice"] <= figures["lost"]


def _until(ledger: Path, answered: int) -> None:
    """Wait for so many answers in a ledger that another process writes."""
    for seen in _answered(ledger):
        if seen >= answered:
            return
    raise AssertionError("the ledger does not fill")


def _answered(ledger: Path) -> Iterator[int]:
    for _ in range(3000):
        time.sleep(0.02)
        if ledger.exists():
            try:
                db = sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)
                yield db.execute("SELECT COUNT(*) FROM calls WHERE state = 'answered'").fetchone()[0]
                db.close()
            except sqlite3.OperationalError:
                pass
