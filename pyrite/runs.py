"""A run folder: config, manifest, metrics, done. Written atomically, resumed exactly, never silently reused.

config.json what was asked; manifest.json what it ran on (versions, hardware, inputs with hashes);
metrics.jsonl one row a logged step; done.json last of all, with the results.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pyrite import __version__, options
from pyrite.processes import world


class RunError(ValueError):
    """A run folder cannot be used as asked; the message says why and what to do."""


@dataclass
class Run:
    """One folder with one config; `results` is set once the job is done."""

    folder: Path
    config: dict[str, Any]
    inputs: dict[str, str]
    results: dict[str, Any] | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> bool:
        return self.results is not None

    @property
    def writes(self) -> bool:
        """Whether this process writes the folder."""
        return world().is_main_process

    def open(self) -> None:
        """Create the folder, once all input has been read and found good."""
        if self.writes and not (self.folder / "config.json").exists():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.folder / "manifest.json", manifest(self.inputs))
                write_json(self.folder / "config.json", self.config)
            except OSError as error:
                raise RunError(f"{self.folder}: cannot write there ({error.strerror}); choose another --out") from error
        world().wait_for_everyone()

    def log(self, **row: Any) -> None:
        """Append one row of metrics."""
        if self.writes:
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
        spent = json.loads(before.read_text()) if before.exists() else 0.0
        self.results = {**results, "seconds": round(time.monotonic() - self.started + spent, 2)}
        self.wait()  # the others may still read the parts
        if self.writes:
            write_json(self.folder / "done.json", self.results)
            before.unlink(missing_ok=True)
            shutil.rmtree(self.folder / "parts", ignore_errors=True)
        world().wait_for_everyone()
        return self

    def wait(self) -> None:
        """Until every process is here, so that what one wrote the others can read."""
        world().wait_for_everyone()

    def pause(self) -> None:
        """Note the time spent so far, so that a resumed run reports all of it."""
        if not self.writes:
            return
        before = self.folder / "seconds.json"
        spent = json.loads(before.read_text()) if before.exists() else 0.0
        now = time.monotonic()
        write_json(before, spent + now - self.started)
        self.started = now


def start(job: str, config: Any, *, inputs: dict[str, str | Path]) -> Run:
    """The run of `config` in the folder `config.out`: new, to be resumed, or done.

    inputs: name to path of what the job reads; their hashes belong to the run's identity.
    Raises ValueError for an option out of its range, RunError for a folder that holds another run, or that cannot be
    written.
    """
    options.check(config)
    folder = Path(config.out)
    wanted = {"job": job, **plain_config(config)}
    seen = {name: fingerprint(path) for name, path in {**inputs, **_own_code(wanted)}.items()}
    if (folder / "config.json").exists():
        _refuse_other(folder, wanted, seen)
    else:
        _refuse_unwritable(folder)
    done = folder / "done.json"
    return Run(folder, wanted, seen, json.loads(done.read_text()) if done.exists() else None)


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
    """Rows of metrics.jsonl; a last line cut by a kill is dropped."""
    path = Path(folder) / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def fingerprint(path: str | Path) -> str:
    """sha256 of a file, or of the names and contents of a folder's files; a Hub name stands for itself."""
    path = Path(path)
    if not path.exists():
        return f"name:{path}"
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text())


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


def manifest(inputs: dict[str, str]) -> dict[str, Any]:
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
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _commit() -> str | None:
    here = Path(__file__).parent
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


def _refuse_other(folder: Path, wanted: dict[str, Any], inputs: dict[str, str]) -> None:
    before = json.loads((folder / "config.json").read_text())
    made_from = json.loads((folder / "manifest.json").read_text())["inputs"]
    old, new = _flat(before), _flat(wanted)
    differences = [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    differences += [f"the {key} file or model has changed" for key in inputs if inputs[key] != made_from.get(key)]
    if differences:
        raise RunError(
            f"{folder}: holds a run with another config ({'; '.join(differences)}); "
            "choose another --out, or delete the folder to start over"
        )


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Options by name, those of groups as "training.lr"."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = _flat(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{name}" if name else key: item for name, item in inner.items()}
    return flat


def _own_code(config: dict[str, Any]) -> dict[str, str]:
    """Files of the user's own named in spec strings, as in "mine.py:score()"."""
    values = [item for value in _flat(config).values() for item in (value if isinstance(value, list) else [value])]
    found = [re.match(r"\s*([^()]+\.py):", value) for value in values if isinstance(value, str)]
    return {match[1]: match[1] for match in found if match}


def _refuse_unwritable(folder: Path) -> None:
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise RunError(f"{folder}: cannot write there ({above} is not a writable folder); choose another --out")


def _plain(value: Any) -> Any:
    """JSON values only, so that a config read back equals the one written."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
