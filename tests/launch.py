"""Start the command line in processes of its own: killed ones, and several that work as one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    return {**os.environ, **quiet}


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """One process, its output captured."""
    command = [sys.executable, "-m", "pyrite", *arguments]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(commands: list[list[str]], *, processes: int) -> str:
    """Commands one after another in several processes that work as one; their output."""
    options = ["--nproc_per_node", str(processes), "--master_port", str(free_port())]
    command = [sys.executable, "-m", "torch.distributed.run", *options, __file__, json.dumps(commands)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


if __name__ == "__main__":
    from pyrite.cli import main

    for arguments in json.loads(sys.argv[1]):
        sys.argv = ["pyrite", *arguments]
        main()
