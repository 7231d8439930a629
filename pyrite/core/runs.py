"""A run folder: config, manifest, metrics, done. Written atomically, resumed exactly, never silently reused.

config.json what was asked; manifest.json what it ran on (versions, hardware, inputs with hashes);
metrics.jsonl one row a logged step; done.json last of all, with the results.

A run is the same run if its options and the content of its inputs are. Another spelling of a path, a moved folder and
an option that a newer version adds make no other run. One process at a time works in a folder.
"""

from __future__ import annotations

import ast
import fcntl
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
from typing import Any, NoReturn, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pyrite import __version__
from pyrite.core import processes
from pyrite.core.processes import on_main, world
from pyrite.math import ranges

# all that a run has before it has learned anything
NOTHING = ("config.json", "manifest.json", "dropped.jsonl", "metrics.jsonl", "seconds.json")
BESIDE = ("metrics.jsonl", "manifest.json", "report.html", "seconds.json")  # of a run, but read by no other job
# what a spec string names, with its weight in a sum: "0.5*mine.py:score(strict=True)"
SPEC = re.compile(r"\s*(?:[-+]?[\d.]+\s*\*\s*)?(?:([^()]+\.py):)?\s*\w+\s*(\(.*\))?\s*", re.DOTALL)
NAMES_A_PATH = ("path", "file", "folder", "model", "tokenizer", "data", "demonstrations", "base")
WRITTEN = ("ledger",)  # options of a spec string that name a file to write

Inputs = Mapping[str, str | Path]


class RunError(ValueError):
    """A run folder cannot be used as asked. The message says why and what to do."""


class TrainingError(RuntimeError):
    """Training cannot go on. The message names the step, the batch and the last good checkpoint."""


class CheckedError(BaseException):
    """A dry run has done all its checks. Holds the run."""

    def __init__(self, run: Run) -> None:
        super().__init__(str(run.folder))
        self.run = run


_dry: list[bool] = []


@contextmanager
def dry() -> Iterator[None]:
    """Jobs that run in this block do all their checks and raise CheckedError before they write or compute."""
    _dry.append(True)
    try:
        yield
    finally:
        _dry.pop()


@dataclass
class Run:
    """One folder with one config. `results` is set once the job is done."""

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
        """End a dry run here: all that can be checked without work has been. `open` and `own` call it too."""
        if _dry:
            raise CheckedError(self)

    def own(self) -> None:
        """Make the folder and become its one owner. `open` does it too; call this to write something before.

        Raises RunError if another process owns the folder, or if since the start it has become another run's, or done.
        """
        self.checked()
        if self.release is None:
            _on_main(self.folder, self._own)

    def open(self) -> None:
        """Create the folder. Call it once all input has been read and found good."""
        self.own()
        _on_main(self.folder, self._identify)

    def _own(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.release = take(self.folder, self)
        _examine(self, starts=False)

    def _identify(self) -> None:
        known = self.folder / "config.json"
        if known.exists() and _empty(self.folder) and read_json(known) != self.config:
            for name in NOTHING:  # nothing came of what was asked before
                (self.folder / name).unlink(missing_ok=True)
        if not known.exists():
            write_json(self.folder / "manifest.json", _manifest(self))
            write_json(known, self.config)

    def log(self, **row: Any) -> None:
        """Append one row of metrics."""
        if self.writes:
            if other := taken_over(self.folder):
                raise RunError(f"{self.folder}: this process was away for so long that {other} took over")
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row, default=float) + "\n")

    def rewind(self, step: int, *, part: str) -> None:
        """Drop the metrics of `part` after `step`; they will be logged again."""
        rows = [row for row in read_metrics(self.folder) if row.get("part") != part or row["step"] <= step]
        if self.writes:
            write_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def finish(self, **results: Any) -> Run:
        """Write done.json, the last act of a job, and delete parts that only a resume would need."""
        self.results = {**results, "seconds": round(self._seconds(), 2)}
        self.wait()  # the others may still read the parts
        if self.writes:
            write_json(self.folder / "done.json", self.results)
            (self.folder / "seconds.json").unlink(missing_ok=True)
            shutil.rmtree(self.folder / "parts", ignore_errors=True)
        self.wait()
        if self.release:
            self.release()
        return self

    def refuse(self, reason: str) -> NoReturn:
        """End a run whose input turned out to be useless before anything was paid or learned, and empty its folder.

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
        """Wait until every process is here, so that all can read what one has written."""
        world().wait_for_everyone()

    def pause(self) -> None:
        """Save the time spent so far, so that a resumed run reports all of it."""
        if self.writes:
            write_json(self.folder / "seconds.json", self._seconds())
            self.started = time.monotonic()

    def _seconds(self) -> float:
        before = self.folder / "seconds.json"
        return (read_json(before) if before.exists() else 0.0) + time.monotonic() - self.started


def start(job: str, config: Any, *, inputs: Inputs | Callable[[Any], Inputs]) -> Run:
    """The run of `config` in the folder `config.out`: new, to be resumed, or done.

    inputs: name to path of what the job reads, or a function of the config that returns it and is called after the
    options are checked. The hashes of inputs belong to the run's identity. Raises ValueError for an option out of its
    range. Raises RunError for a folder that holds another run or other files, that another process works in, or that
    cannot be written.
    """
    ranges.check(config)
    processes.anew()
    run = Run(Path(config.out).expanduser(), {"job": job, **plain_config(config)}, {}, job=config)
    found = _on_main(run.folder, lambda: _look(run, inputs(config) if callable(inputs) else inputs))
    run.inputs, run.paths, run.results = found
    return run


def reads(config: Any, inputs: Mapping[str, str | Path]) -> dict[str, str | Path]:
    """All that a job reads: its inputs, and the files and models that its spec strings name."""
    more = {f"{key} file {i}": path for key, path, i in _in_specs(plain_config(config))}
    known = {str(path) for path in inputs.values()}
    return {**inputs, **{name: path for name, path in more.items() if path not in known}}


def hold(folder: Path, owner: object) -> Callable[[], object]:
    """Own a folder that is no run's until the returned function is called, which also removes the folder if it is
    empty.

    Raises RunError, in all processes, if it has an owner or cannot be made.
    """
    releases: list[Callable[[], object]] = []

    def claim() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        releases.append(take(folder, owner))

    def release() -> None:
        for one in releases:
            one()
            with suppress(OSError):
                folder.rmdir()

    _on_main(folder, claim)
    return release


def plain_config(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON values, without the folder it goes to."""
    return _plain({key: value for key, value in asdict(config).items() if key != "out"})


def in_parts(folder: Path, total: int, work: Callable[[int, int], dict[str, list]], *, size: int) -> pa.Table:
    """The columns of work(begin, end) over range(total). Each part is stored when done and never computed twice.

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
    """Rows of metrics.jsonl. A last line cut by a kill is dropped; any other broken line raises RunError."""
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
    """sha256 of a file, or of the names and contents of a folder's files. A Hub name stands for itself.

    Files of a run's folder that no other job reads are left out, so that writing a report changes nothing.
    """
    path = Path(path)
    if not path.exists():
        return f"name:{path}"
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name != LOCK)
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


def write_bytes(path: Path, content: bytes) -> None:
    """Whole or not at all: written beside, flushed, then renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Text as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """JSON, whole or not at all. Raises ValueError for numbers that JSON cannot hold."""
    write_text(path, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def _manifest(run: Run) -> dict[str, Any]:
    """What a run was made with: versions, hardware, inputs."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return {
        "pyrite": __version__,
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "peft", "datasets")},
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "processes": world().num_processes,
        },
        "inputs": run.inputs,
        "paths": run.paths,
        "identity": _identity(run),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


# Is the folder free, and is it the same run?


T = TypeVar("T")


def _on_main(folder: Path, work: Callable[[], T]) -> T:
    """Do some work in the main process and return its result in all of them. All raise RunError if it fails."""

    def attempt() -> tuple[Any, str | None]:
        try:
            return work(), None
        except RunError as error:
            return None, str(error)
        except OSError as error:
            return None, f"{folder}: cannot write there ({error.strerror or error}); choose another --out"

    found, trouble = on_main(attempt)()
    if trouble:
        raise RunError(trouble)
    return found


def _look(run: Run, inputs: Mapping[str, str | Path]) -> tuple[dict[str, str], dict[str, str], Any]:
    """Fingerprints and paths of the inputs and the results so far. Raises RunError if the run cannot be started."""
    run.paths = {name: str(path) for name, path in reads(run.job, inputs).items()}
    try:
        run.inputs = {name: fingerprint(path) for name, path in run.paths.items()}
    except OSError as error:
        raise RunError(f"{error.filename}: cannot be read ({error.strerror or error})") from None
    if trouble := _unusable(run.folder):
        raise RunError(trouble)
    _examine(run, starts=True)
    return run.inputs, run.paths, run.results


def _examine(run: Run, *, starts: bool) -> None:
    """Raise RunError if a run cannot have its folder. If it is done, which only the start allows, read its results."""
    folder, done = run.folder, run.folder / "done.json"
    owner = holder(folder) if folder.is_dir() else None
    if (folder / "config.json").exists():
        differences = _differences(run)
        if done.exists() and not differences:
            run.results = read_json(done)
            if not isinstance(run.results, dict):
                raise RunError(f"{done}: holds no results; restore it, or delete its folder to start over")
            if not starts:
                raise RunError(f"{folder}: another process has done this run meanwhile; see {done}")
            return
        if differences and (done.exists() or owner or not _empty(folder)):
            raise RunError(
                f"{folder}: holds a run with another config ({'; '.join(differences)}); "
                "choose another --out, or delete the folder to start over"
            )
    elif other := sorted(p.name for p in folder.glob("*") if not _leftover(p)):
        what = "a sweep" if "sweep.json" in other else f"files that are no run's ({', '.join(other[:3])})"
        raise RunError(f"{folder}: holds {what}; choose another --out, a folder that is new or empty")
    if owner:
        raise RunError(f"{folder}: {owner} is working there; wait for it, or choose another --out")


def _leftover(path: Path) -> bool:
    """Whether a file may lie in the folder of a new run because an earlier attempt left it."""
    if path.name == "manifest.json":
        return isinstance(read_json(path), dict) and "pyrite" in read_json(path)
    return path.name.startswith("ledger.db") or (path.is_file() and path.name[0] == ".")


def _empty(folder: Path) -> bool:
    """Whether nothing was learned, drawn or paid in a run's folder: it holds the config and rows of the start only."""
    for path in folder.glob("*"):
        if path.is_dir() and any(inside.is_file() for inside in path.rglob("*")):
            return False
        if path.is_file() and path.name not in NOTHING and not _leftover(path):
            return False
    return not (folder / "ledger.db").exists() and all(row.get("step") == 0 for row in read_metrics(folder))


def _differences(run: Run) -> list[str]:
    """How the run in the folder differs from the one that is asked for, option by option and input by input."""
    before, made = read_json(run.folder / "config.json"), run.folder / "manifest.json"
    if not isinstance(before, dict) or "job" not in before:
        raise RunError(f"{run.folder}: holds a config.json that is no run's; choose another --out")
    if not made.exists():
        raise RunError(f"{made}: is missing; restore it, or delete its folder to start over")
    about = read_json(made)
    if not isinstance(about, dict) or not isinstance(about.get("inputs"), dict):
        raise RunError(f"{made}: says nothing of inputs; restore it, or delete its folder to start over")
    if "identity" not in about:
        raise RunError(f"{run.folder}: holds a run of an earlier version, with other options; choose another --out")
    if before["job"] != run.config["job"]:
        return [f"job: {before['job']!r} there, {run.config['job']!r} now"]
    theirs, mine, usual = about["identity"], _identity(run), _flat(_plain(_defaults(run.job)))
    old, new = _flat(before), _flat(run.config)
    found = [
        f"{key}: {old.get(key, theirs.get(key, usual.get(key)))!r} there, {new.get(key)!r} now"
        for key in sorted({*theirs, *mine})
        if theirs.get(key, usual.get(key)) != mine.get(key)
        and (key in mine or theirs[key])  # else an option of another version that was not used
    ]
    for name, path in run.paths.items():
        if about["inputs"].get(name, run.inputs[name]) != run.inputs[name]:
            gone = " is not there any more" if run.inputs[name].startswith("name:") else " has changed"
            found.append(f"the {path if name.split()[-1].isdigit() else name} file or model{gone}")
    return found


def _identity(run: Run) -> dict[str, Any]:
    """The options, flat. Paths of inputs are replaced by fingerprints, other paths are in full."""
    known = {path: run.inputs[name] for name, path in run.paths.items() if path}

    def put(value: Any) -> Any:
        if isinstance(value, list):
            return [put(item) for item in value]
        if not isinstance(value, str):
            return value
        for path in sorted(known, key=len, reverse=True):
            value = re.sub(rf"(?<![\w./~-]){re.escape(path)}/?(?![\w./-])", f"<{known[path]}>", value)
        return value

    found = {key: put(value) for key, value in _flat(run.config).items()}
    paths = [key for key, value in _flat(_values(run.job)).items() if isinstance(value, Path) and key in found]
    return found | {key: os.path.realpath(os.path.expanduser(found[key])) for key in paths}


def _values(config: Any) -> dict[str, Any]:
    """The options of a Config by name, groups within it as dictionaries."""
    found = {one.name: getattr(config, one.name) for one in fields(config)} if is_dataclass(config) else {}
    return {name: _values(value) if is_dataclass(value) else value for name, value in found.items()}


def _defaults(config: Any) -> dict[str, Any]:
    """The default of each option of a Config. A group without a default, such as a recipe's settings, has those of its
    own class."""
    found: dict[str, Any] = {}
    for one in fields(config) if is_dataclass(config) else ():
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if default is not MISSING:
            found[one.name] = _values(default) if is_dataclass(default) else default
        elif is_dataclass(given := getattr(config, one.name)):
            found[one.name] = _defaults(given)
    return found


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Options by name, those of groups as "training.lr"."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = _flat(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{name}" if name else key: item for name, item in inner.items()}
    return flat


def _in_specs(config: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """(option, path, number) of the files that spec strings name: a file of your own as in "mine.py:score()", and
    existing paths in options as in "reward(path='runs/reward')"."""
    for key, value in _flat(config).items():
        found = [path for item in (value if isinstance(value, list) else [value]) for path in named(item)]
        yield from ((key, path, i) for i, path in enumerate(dict.fromkeys(found)))


def named(spec: Any) -> Iterator[str]:
    """The paths that a spec string names, also in specs among its options."""
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
    """The value of an option of a spec, if it is an existing path."""
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


def _plain(value: Any) -> Any:
    """JSON values only, so that a config read back equals the one written."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# One owner at a time for a folder: a locked file that names host and process, and a heartbeat.


LOCK = ".lock"
BEAT = 20.0  # seconds between two signs of life
GONE = 300.0  # seconds without one after which an owner on another host is taken to be gone


@dataclass
class Lock:
    """A folder owned by this process until it is released, at the latest when the process ends.

    The system drops the lock on the file if the process dies. It may not know of locks on other hosts: for those the
    heartbeat tells whether an owner is alive.
    """

    path: Path
    file: int
    token: str
    ended: threading.Event = field(default_factory=threading.Event)
    users: int = 1

    @property
    def kept(self) -> bool:
        """Whether it is still ours. After a long pause another host may have taken over."""
        return _read(self.path).get("token") == self.token

    def beat(self) -> None:
        """Touch the lock file every few seconds until it is released."""
        while not self.ended.wait(BEAT):
            with suppress(OSError):
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
            with suppress(OSError):
                if self.kept:
                    self.path.unlink()
            os.close(self.file)


_held: dict[Path, Lock] = {}  # of this process


def take(folder: Path, owner: object) -> Callable[[], object]:
    """Own the folder, which must exist, until the returned function is called or `owner` is deleted.

    Raises RunError if another process owns it, OSError if the folder cannot be written.
    """
    path = folder.resolve() / LOCK
    lock = _held.get(path)
    if lock is not None and lock.kept:
        lock.users += 1
    else:
        mine = {"host": _host(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        lock = Lock(path, _locked(path), secrets.token_hex(8))
        os.truncate(lock.file, 0)
        os.pwrite(lock.file, json.dumps({**mine, "token": lock.token}).encode(), 0)
        _held[path] = lock
        threading.Thread(target=lock.beat, daemon=True, name=f"heartbeat of {path}").start()
    return weakref.finalize(owner, lock.release, os.getpid())


def taken_over(folder: Path) -> str | None:
    """Who has taken over a folder that this process owned. None if nobody has, or if the lock cannot be read."""
    lock = _held.get(folder.resolve() / LOCK)
    found = _read(lock.path) if lock else {}
    return _told(found) if lock and found.get("token", lock.token) != lock.token else None


def holder(folder: Path) -> str | None:
    """The other process that owns the folder: "process 12 on host name, since ...". None if there is none."""
    path = folder.resolve() / LOCK
    if path in _held:
        return None
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return _owner(file, path, fcntl.LOCK_SH)
    finally:
        os.close(file)


def _locked(path: Path) -> int:
    """The lock file, open and locked. Raises RunError, naming the owner, if there is one."""
    for wait in (0.05, 0.1, 0.2, 0.4, 0):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        owner = _owner(file, path, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if owner is None and os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)
        time.sleep(wait)  # somebody may be looking at the lock, or have just removed it
    raise RunError(f"{path.parent}: {owner or 'somebody'} is working there; wait for it, or choose another --out")


def _owner(file: int, path: Path, kind: int) -> str | None:
    """Who has the lock on this open file. None if nobody had it: it is ours now."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        here = True
    except BlockingIOError:
        return _told(_read(path))
    except OSError:  # a file system that has no locks
        here = False
    found = _read(path)
    elsewhere = bool(found) and not (here and found.get("host") == _host())
    return _told(found) if elsewhere and _age(path) < GONE else None


def _host() -> str:
    return socket.gethostname()


def _age(path: Path) -> float:
    """Seconds since a file was touched, by the clock of its file system."""
    probe = path.with_name(f"{LOCK}.now.{secrets.token_hex(8)}")
    now = time.time()
    with suppress(OSError):  # read only
        probe.touch()
        now = probe.stat().st_mtime
    with suppress(OSError):
        probe.unlink(missing_ok=True)
    try:
        return now - path.stat().st_mtime
    except OSError:
        return GONE


def _read(path: Path) -> dict[str, Any]:
    """What a lock says; nothing if there is none, or if it is being written."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _told(found: dict[str, Any]) -> str:
    pid, host, since = (found.get(name, "unknown") for name in ("pid", "host", "since"))
    return f"process {pid} on host {host} (since {since})"
