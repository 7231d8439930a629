"""One owner at a time for a folder: a lock file that names host and process, and a heartbeat.

The lock is the file `.lock`. It is made by a hard link, which succeeds for at most one process, also on network file
systems. Its owner touches it every 20 seconds. A lock is taken over at once if its process is gone from this host, and
after 5 minutes without a heartbeat if it is another host's. Reading needs no lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

NAME = ".lock"
BEAT = 20.0  # seconds between two signs of life
GONE = 300.0  # seconds without one after which an owner on another host is taken to be gone
TRIES = 50


class LockError(ValueError):
    """Another process owns the folder; the message names it."""


@dataclass
class Lock:
    """A folder owned by this process until it is released, at the latest when the process ends."""

    path: Path
    token: str
    ended: threading.Event = field(default_factory=threading.Event)
    users: int = 1

    @property
    def kept(self) -> bool:
        """Whether it is still ours; it is not if we were away so long that another host took over."""
        return _read(self.path).get("token") == self.token

    def beat(self) -> None:
        """Show a sign of life until the lock is released."""
        while not self.ended.wait(BEAT):
            with contextlib.suppress(OSError):
                if self.kept:
                    os.utime(self.path)

    def release(self, pid: int) -> None:
        """Let the folder go, once nobody in this process uses it any more."""
        if os.getpid() != pid or self.ended.is_set():  # a child that inherited it owns nothing
            return
        self.users -= 1
        if self.users == 0:
            self.ended.set()
            if _held.get(self.path) is self:
                del _held[self.path]
            with contextlib.suppress(OSError):
                if self.kept:
                    self.path.unlink()


_held: dict[Path, Lock] = {}  # of this process


def take(folder: Path, owner: object) -> Callable[[], object]:
    """Own the folder, which must exist, until the function that is returned is called or `owner` is no more.

    Raises LockError if another process owns it, OSError if the folder cannot be written.
    """
    path = folder.resolve() / NAME
    lock = _held.get(path)
    if lock is not None and lock.kept:
        lock.users += 1
    else:
        lock = Lock(path, _make(path))
        _held[path] = lock
        threading.Thread(target=lock.beat, daemon=True, name=f"heartbeat of {path}").start()
    return weakref.finalize(owner, lock.release, os.getpid())


def lost(folder: Path) -> str | None:
    """Who has taken over a folder that this process owned; None if nobody has, also if the lock cannot be read."""
    lock = _held.get(folder.resolve() / NAME)
    found = _read(lock.path) if lock else {}
    return _told(found) if lock and found.get("token", lock.token) != lock.token else None


def holder(folder: Path) -> str | None:
    """Who owns the folder in another process: "process 12 on host name, since ..."; None if nobody does."""
    path = folder.resolve() / NAME
    found = _read(path)
    return _told(found) if found and path not in _held and _alive(path, found) else None


def _make(path: Path) -> str:
    """Make the lock file; the token that tells it from others."""
    mine = {**_myself(), "token": secrets.token_hex(8), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    beside = path.with_name(f"{NAME}.{mine['token']}")
    beside.write_text(json.dumps(mine))
    try:
        for _ in range(TRIES):
            if _link(beside, path):
                return mine["token"]
            found = _read(path)
            if _alive(path, found):
                raise LockError(f"{path.parent}: {_told(found)} is working there; wait for it, or choose another --out")
            _remove(path, found)
        raise LockError(f"{path.parent}: cannot be locked; delete {path} if no process is working there")
    finally:
        beside.unlink(missing_ok=True)


def _link(beside: Path, path: Path) -> bool:
    """Whether `beside` became the lock; False if there is one already."""
    try:
        os.link(beside, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with path.open("x") as file:
                file.write(beside.read_text())
        except FileExistsError:
            return False
    return True


def _remove(path: Path, found: dict[str, Any]) -> None:
    """Remove the lock of an owner that is gone; one process at a time, and no lock but that one."""
    claim = path.with_name(f"{NAME}.gone.{found.get('token', 'unknown')}")
    try:
        claim.open("x").close()
    except FileExistsError:
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            if _age(claim) > 10:  # who began to remove it was killed
                claim.unlink()
        return
    with contextlib.suppress(FileNotFoundError):
        if _read(path).get("token") == found.get("token"):
            path.unlink()
    claim.unlink(missing_ok=True)


def _myself() -> dict[str, Any]:
    return {"host": _host(), "pid": os.getpid(), "born": psutil.Process().create_time()}


def _host() -> str:
    """This host, and the space of its process ids: containers on one host may each have their own."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _alive(path: Path, found: dict[str, Any]) -> bool:
    """Whether the owner of a lock still runs, as far as one can know from here."""
    if found.get("host") != _host():
        try:
            return _age(path) < GONE
        except OSError:
            return False
    try:
        process = psutil.Process(found["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - found["born"]) < 1
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False
    except psutil.AccessDenied:
        return True


def _age(path: Path) -> float:
    """Seconds since a file was touched, by the clock of its file system."""
    probe = path.with_name(f"{NAME}.now.{secrets.token_hex(8)}")
    try:
        probe.touch()
        now = probe.stat().st_mtime
    except OSError:  # read only
        now = time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return now - path.stat().st_mtime


def _read(path: Path) -> dict[str, Any]:
    """What a lock says; nothing if there is none, or if it is being written."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _told(found: dict[str, Any]) -> str:
    host = str(found.get("host", "unknown")).partition(" ")[0]
    return f"process {found.get('pid', 'unknown')} on host {host} (since {found.get('since', 'unknown')})"
