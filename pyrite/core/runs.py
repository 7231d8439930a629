"""A run folder: config, manifest, metrics, done. Written atomically, resumed exactly, never silently reused.

config.json what was asked; manifest.json what it ran on (versions, hardware, inputs with hashes);
metrics.jsonl one row a logged step; done.json last of all, with the results.

A run is the same run if its options and the content of its inputs are: another spelling of a path, a moved folder and
an option that a newer version adds make no other run. One process at a time works in a folder (`pyrite.core.runs`).
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pyrite import __version__
from pyrite.core import processes
from pyrite.core.processes import on_main, world
from pyrite.math import ranges

# locks: One owner at a time for a folder: a lock file that names host and process, and a heartbeat.


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


# runs: A run folder: config, manifest, metrics, done. Written atomically, resumed exactly, never silently reused.


OURS = ("config.json", "manifest.json")
NOTHING = (*OURS, "dropped.jsonl", "metrics.jsonl", "seconds.json")  # all that a run has before it has learned anything
BESIDE = ("metrics.jsonl", "manifest.json", "report.html", "seconds.json")  # of a run, but read by no other job
BEFORE = ("done.json", "pairs.parquet")  # what stood for a whole folder in the manifests of earlier versions
# what a spec string names, with its weight in a sum: "0.5*mine.py:score(strict=True)"
SPEC = re.compile(r"\s*(?:[-+]?[\d.]+\s*\*\s*)?(?:([^()]+\.py):)?\s*\w+\s*(\(.*\))?\s*", re.DOTALL)
NAMES_A_PATH = ("path", "file", "folder", "model", "tokenizer", "data", "demonstrations", "base")
WRITTEN = ("ledger",)  # options of a spec string that name a file to write

Inputs = Mapping[str, str | Path]


class RunError(ValueError):
    """A run folder cannot be used as asked; the message says why and what to do."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step, the batch and the last good checkpoint."""


class CheckedError(BaseException):
    """A dry run has come as far as it goes; the run it is of."""

    def __init__(self, run: Run) -> None:
        super().__init__(str(run.folder))
        self.run = run


_dry: list[bool] = []


@contextmanager
def dry() -> Iterator[None]:
    """A job that runs in here does all its checks, and ends by CheckedError before it writes or works."""
    _dry.append(True)
    try:
        yield
    finally:
        _dry.pop()


@dataclass
class Run:
    """One folder with one config; `results` is set once the job is done."""

    folder: Path
    config: dict[str, Any]
    inputs: dict[str, str]
    results: dict[str, Any] | None = None
    started: float = field(default_factory=time.monotonic)
    paths: dict[str, str] = field(default_factory=dict)
    """Where the inputs were read, as they were spelled."""
    job: Any = None
    """The options as the job has them."""
    release: Callable[[], object] | None = None

    @property
    def done(self) -> bool:
        return self.results is not None

    @property
    def writes(self) -> bool:
        """Whether this process writes the folder."""
        return world().is_main_process

    def checked(self) -> None:
        """All that can be checked without work has been: a dry run ends here. `open` and `own` say so too."""
        if _dry:
            raise CheckedError(self)

    def own(self) -> None:
        """Make the folder and become its one owner. `open` does it too; this is for what is written before.

        Raises RunError if another process owns the folder, or if it has become another run's, or done, since the start.
        """
        self.checked()
        if trouble := on_main(self._own)():
            raise RunError(trouble)

    def open(self) -> None:
        """Create the folder, once all input has been read and found good."""
        self.own()
        if trouble := on_main(self._identify)():
            raise RunError(trouble)

    def _own(self) -> str | None:
        if self.release:
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.release = take(self.folder, self)
            return _trouble(self)
        except LockError as error:
            return str(error)
        except RunError as error:
            return str(error)
        except OSError as error:
            return _unwritable(self.folder, error)

    def _identify(self) -> str | None:
        known = self.folder / "config.json"
        try:
            if known.exists() and _empty(self.folder) and read_json(known) != self.config:
                for name in NOTHING:  # nothing came of what was asked before
                    (self.folder / name).unlink(missing_ok=True)
            if not known.exists():
                write_json(self.folder / "manifest.json", manifest(self.inputs, self.paths))
                write_json(known, self.config)
        except RunError as error:
            return str(error)
        except OSError as error:
            return _unwritable(self.folder, error)
        return None

    def log(self, **row: Any) -> None:
        """Append one row of metrics."""
        if self.writes:
            if other := lost(self.folder):
                raise RunError(f"{self.folder}: this process was away for so long that {other} took over")
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row, default=float) + "\n")

    def rewind(self, step: int, *, part: str) -> None:
        """Forget metrics of `part` after `step`: they will be logged again."""
        rows = [row for row in read_metrics(self.folder) if row.get("part") != part or row["step"] <= step]
        if self.writes:
            write_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def finish(self, **results: Any) -> Run:
        """Write done.json, the last act of a job; parts that only a resume would need are dropped."""
        before = self.folder / "seconds.json"
        spent = read_json(before) if before.exists() else 0.0
        self.results = {**results, "seconds": round(time.monotonic() - self.started + spent, 2)}
        self.wait()  # the others may still read the parts
        if self.writes:
            write_json(self.folder / "done.json", self.results)
            before.unlink(missing_ok=True)
            shutil.rmtree(self.folder / "parts", ignore_errors=True)
        world().wait_for_everyone()
        if self.release:
            self.release()
        return self

    def refuse(self, reason: str) -> NoReturn:
        """End a run whose input turned out to be useless after work that cost nothing: its folder is as good as new.

        Raises ValueError with the reason.
        """
        self.wait()
        if self.writes:
            for name in ("parts", "checkpoints"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for name in NOTHING:
                (self.folder / name).unlink(missing_ok=True)
        if self.release:
            self.release()
        raise ValueError(reason)

    def wait(self) -> None:
        """Until every process is here, so that what one wrote the others can read."""
        world().wait_for_everyone()

    def pause(self) -> None:
        """Note the time spent so far, so that a resumed run reports all of it."""
        if not self.writes:
            return
        before = self.folder / "seconds.json"
        spent = read_json(before) if before.exists() else 0.0
        now = time.monotonic()
        write_json(before, spent + now - self.started)
        self.started = now


def start(job: str, config: Any, *, inputs: Inputs | Callable[[Any], Inputs]) -> Run:
    """The run of `config` in the folder `config.out`: new, to be resumed, or done.

    inputs: name to path of what the job reads, or a function of the config that says so, asked once the options are
    found good; their hashes belong to the run's identity.
    Raises ValueError for an option out of its range, RunError for a folder that holds another run or anything else,
    that another process works in, or that cannot be written.
    """
    ranges.check(config)
    processes.anew()
    run = Run(Path(config.out).expanduser(), {"job": job, **plain_config(config)}, {}, job=config)
    found, trouble = on_main(_looked)(run, inputs(config) if callable(inputs) else inputs)
    if trouble:
        raise RunError(trouble)
    run.inputs, run.paths, run.results = found
    return run


def reads(config: Any, inputs: Mapping[str, str | Path]) -> dict[str, str | Path]:
    """All that a job reads: its inputs, and the files and models that its spec strings name."""
    more = {f"{key} file {i}": path for key, path, i in _in_specs(plain_config(config))}
    known = {str(path) for path in inputs.values()}
    return {**inputs, **{name: path for name, path in more.items() if path not in known}}


def hold(folder: Path, owner: object) -> Callable[[], object]:
    """Own a folder that is no run's, until the returned function is called, which removes the folder if it is empty.

    Raises RunError, in all processes, if it has an owner or cannot be made.
    """
    taken: list[Callable[[], object]] = []

    def claim() -> str | None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            taken.append(take(folder, owner))
        except LockError as error:
            return str(error)
        except OSError as error:
            return _unwritable(folder, error)
        return None

    def release() -> None:
        for let_go in taken:
            let_go()
            with suppress(OSError):
                folder.rmdir()

    if trouble := on_main(claim)():
        raise RunError(trouble)
    return release


def plain_config(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON values, without the folder it goes to."""
    return _plain({key: value for key, value in asdict(config).items() if key != "out"})


def in_parts(folder: Path, total: int, work: Callable[[int, int], dict[str, list]], *, size: int) -> pa.Table:
    """The columns of work(begin, end) over range(total), each part stored when done and never done twice.

    Parts are dealt out to the processes; all of them return the whole table. `folder` lies in the run's `parts`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = world()
    paths = [(begin, folder / f"{begin:09d}.parquet") for begin in range(0, total, size)]
    for begin, path in paths[state.process_index :: state.num_processes]:
        if not path.exists():
            table = pa.table(work(begin, min(begin + size, total)))
            pq.write_table(table, path.with_name(f".{path.name}"))
            path.with_name(f".{path.name}").replace(path)
    state.wait_for_everyone()
    return pa.concat_tables([pq.read_table(path) for _, path in paths])


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; a last line cut by a kill is dropped. Raises RunError for any other line that is none."""
    path = Path(folder) / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines() if path.exists() else []
    except ValueError as error:
        raise RunError(f"{path}: is no text ({error}); restore it, or start the run again in another --out") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            if number < len(lines):
                where = f"{path}, line {number}"
                raise RunError(f"{where}: is no row of metrics; restore it, or start again in another --out") from None
    return rows


def fingerprint(path: str | Path) -> str:
    """sha256 of a file, or of the names and contents of a folder's files; a Hub name stands for itself.

    Of a run's folder, what no other job reads is left out: a report may be written, and nothing has changed.
    """
    path = Path(path)
    if not path.exists():
        return f"name:{path}"
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name != NAME)
    if any((path / name).is_file() for name in ("manifest.json", "done.json")):
        files = [p for p in files if p.relative_to(path).parts[0] not in (*BESIDE, "figures")]
    for file in files:
        digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises RunError, naming it, if it is none."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        broken = "empty" if not path.stat().st_size else f"not JSON ({error})"
        raise RunError(f"{path}: is {broken}; restore it, or delete its folder to start over") from None


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: written beside, flushed, then renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """JSON, atomically; numbers that JSON cannot hold are refused."""
    write_text(path, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def manifest(inputs: dict[str, str], paths: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a run ran on."""
    return {
        "pyrite": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "peft", "datasets")},
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "processes": world().num_processes,
        },
        "inputs": inputs,
        "paths": dict(paths or {}),
        "cwd": str(Path.cwd()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _commit() -> str | None:
    here = Path(__file__).parent
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


def _looked(run: Run, inputs: Mapping[str, str | Path]) -> tuple[tuple[Any, Any, Any], str | None]:
    """Fingerprints and paths of the inputs and the results so far; why the run cannot be started, or None."""
    found = reads(run.job, inputs)
    run.paths = {name: str(path) for name, path in found.items()}
    try:
        run.inputs = {name: fingerprint(path) for name, path in found.items()}
    except OSError as error:
        return (run.inputs, run.paths, run.results), f"{error.filename}: cannot be read ({error.strerror or error})"
    try:
        trouble = _unusable(run.folder) or _trouble(run, starts=True)
    except RunError as error:
        trouble = str(error)
    except OSError as error:
        trouble = _unwritable(run.folder, error)
    return (run.inputs, run.paths, run.results), trouble


def _trouble(run: Run, *, starts: bool = False) -> str | None:
    """Why a run cannot have its folder; its results are read if it is done. After the start it must still be undone."""
    folder, done = run.folder, run.folder / "done.json"
    if not (folder / "config.json").exists():
        if other := sorted(p.name for p in folder.glob("*") if not _leftover(p)):
            what = "a sweep" if "sweep.json" in other else f"files that are no run's ({', '.join(other[:3])})"
            return f"{folder}: holds {what}; choose another --out, a folder that is new or empty"
        owner = holder(folder) if folder.is_dir() else None
    else:
        owner = holder(folder) if not done.exists() else None
        differences = _differences(run)
        if differences and not (owner is None and _empty(folder)):
            return (
                f"{folder}: holds a run with another config ({'; '.join(differences)}); "
                "choose another --out, or delete the folder to start over"
            )
        if done.exists() and not differences:
            run.results = read_json(done)
            if not isinstance(run.results, dict):
                raise RunError(f"{done}: holds no results; restore it, or delete its folder to start over")
            return None if starts else f"{folder}: another process has done this run meanwhile; see {done}"
    return f"{folder}: {owner} is working there; wait for it, or choose another --out" if owner else None


def _leftover(path: Path) -> bool:
    """What may lie in the folder of a new run: what an earlier attempt wrote before there was a run."""
    if path.name == "manifest.json":
        return isinstance(read_json(path), dict) and "pyrite" in read_json(path)
    return path.name.startswith("ledger.db") or (path.is_file() and path.name[0] == ".")


def _empty(folder: Path) -> bool:
    """Whether nothing was learned, drawn or paid in a run's folder: only its config is there, and rows of the start."""
    for path in folder.glob("*"):
        if path.is_dir() and any(inside.is_file() for inside in path.rglob("*")):
            return False
        if path.is_file() and path.name not in NOTHING and not _leftover(path):
            return False
    return not (folder / "ledger.db").exists() and all(row.get("step") == 0 for row in read_metrics(folder))


def _differences(run: Run) -> list[str]:
    """What tells the run in the folder from the one that is asked for, option by option and input by input."""
    before, made = read_json(run.folder / "config.json"), run.folder / "manifest.json"
    if not isinstance(before, dict) or "job" not in before:
        raise RunError(f"{run.folder}: holds a config.json that is no run's; choose another --out")
    if not made.exists():
        raise RunError(f"{made}: is missing; restore it, or delete its folder to start over")
    about = read_json(made)
    if not isinstance(about, dict) or not isinstance(about.get("inputs"), dict):
        raise RunError(f"{made}: says nothing of inputs; restore it, or delete its folder to start over")
    if before["job"] != run.config["job"]:
        return [f"job: {before['job']!r} there, {run.config['job']!r} now"]
    theirs, mine = _spelled(before, about), _spelled(run.config, {"inputs": run.inputs, "paths": run.paths})
    usual = _flat(_defaults(run.job))
    old, new = _flat(before), _flat(run.config)
    found = []
    for key in sorted({*old, *new}):
        then, now = old.get(key, usual.get(key)), new.get(key)
        if key not in new and not then:  # an option of another version, not used
            continue
        where = str(Path(about.get("cwd", "."))) if isinstance(then, str) else "."
        if not (then == now or theirs(then) == mine(now) or _one_place(key, then, now, where, run.job)):
            found.append(f"{key}: {then!r} there, {now!r} now")
    for name, path in run.paths.items():
        was = about["inputs"].get(name, about["inputs"].get(path))
        if was is not None and was not in (run.inputs[name], *(fingerprint(Path(path) / old) for old in BEFORE)):
            gone = " is not there any more" if run.inputs[name].startswith("name:") else " has changed"
            found.append(f"the {path if name.split()[-1].isdigit() else name} file or model{gone}")
    return found


def _spelled(config: Mapping[str, Any], about: Mapping[str, Any]) -> Callable[[Any], Any]:
    """A function that puts fingerprints in place of the paths of inputs in an option's value."""
    flat = _flat(dict(config))
    last = {key.rpartition(".")[2]: value for key, value in flat.items()}  # before paths were kept, names were options
    paths = about.get("paths") or {name: last.get(name) for name in about["inputs"]}
    known = {str(path): about["inputs"].get(name) for name, path in paths.items() if isinstance(path, str) and path}

    def put(value: Any) -> Any:
        if isinstance(value, list):
            return [put(item) for item in value]
        if not isinstance(value, str):
            return value
        for path in sorted(known, key=len, reverse=True):
            value = re.sub(rf"(?<![\w./~-]){re.escape(path)}/?(?![\w./-])", f"<{known[path]}>", value)
        return value

    return put


def _one_place(key: str, then: Any, now: Any, where: str, config: Any) -> bool:
    """Whether two spellings of an option that is a path mean one place."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name, None)
    if not isinstance(value, Path) or not isinstance(then, str) or not isinstance(now, str):
        return False
    return os.path.realpath(Path(where, os.path.expanduser(then))) == os.path.realpath(os.path.expanduser(now))


def _defaults(config: Any) -> dict[str, Any]:
    """The values that options have if they are left out, groups as the options above them have them."""
    found: dict[str, Any] = {}
    for one in fields(config) if is_dataclass(config) else ():
        factory = one.default_factory
        value = one.default if factory is MISSING else factory()
        if value is not MISSING:
            found[one.name] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        elif is_dataclass(given := getattr(config, one.name)):
            found[one.name] = _defaults(given)
    return _plain(found)


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Options by name, those of groups as "training.lr"."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = _flat(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{name}" if name else key: item for name, item in inner.items()}
    return flat


def _in_specs(config: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """(option, path, number) of all that spec strings name: files of your own as in "mine.py:score()", and whatever is
    there of the paths in their options, as in "reward(path='runs/reward')"."""
    for key, value in _flat(config).items():
        found = [path for item in (value if isinstance(value, list) else [value]) for path in named(item)]
        yield from ((key, path, i) for i, path in enumerate(dict.fromkeys(found)))


def named(spec: Any) -> Iterator[str]:
    """The paths that a spec string names, those of specs in its options among them."""
    match = SPEC.fullmatch(spec) if isinstance(spec, str) else None
    if match is None:
        return
    if match[1]:
        yield match[1]
    try:
        call = ast.parse(f"f{match[2] or '()'}", mode="eval").body
    except (SyntaxError, ValueError):
        return
    for keyword in call.keywords if isinstance(call, ast.Call) else ():
        for literal in ast.walk(keyword.value) if keyword.arg not in WRITTEN else ():
            if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                found = list(_there(str(keyword.arg), literal.value))
                yield from found or named(literal.value)


def _there(option: str, text: str) -> Iterator[str]:
    """The value of an option of a spec, if it is a path of something that is there."""
    looks = "/" in text or option in NAMES_A_PATH or bool(Path(text).suffix)
    try:
        if looks and len(text) < 1024 and text.strip() and Path(text).exists():
            yield text
    except OSError:
        return


def _unusable(folder: Path) -> str | None:
    """Why a folder cannot be a run's, whatever it holds."""
    if folder == Path() and not (folder / "config.json").exists():
        return "--out is the current folder; name a folder for the run"
    if folder.is_symlink() and not folder.exists():
        return f"{folder}: is a link to {os.readlink(folder)}, which is not there; choose another --out"
    if folder.exists() and not folder.is_dir():
        return f"{folder}: cannot write there (it is a file); choose another --out"
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not above.is_dir() or not os.access(above, os.W_OK):
        return f"{folder}: cannot write there ({above} is not a writable folder); choose another --out"
    return None


def _unwritable(folder: Path, error: OSError) -> str:
    return f"{folder}: cannot write there ({error.strerror or error}); choose another --out"


def _plain(value: Any) -> Any:
    """JSON values only, so that a config read back equals the one written."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
