"""Errors that are not Pyrite's own words, in one line that says whose they are and where they arose."""

from __future__ import annotations

import dis
import sysconfig
import traceback
from pathlib import Path

HERE = Path(__file__).parent
LIBRARIES = tuple(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib"))
RAISE = dis.opmap["RAISE_VARARGS"]


def line(error: BaseException) -> str:
    """What the command line says of an error: its message and, if Pyrite did not raise it itself, its place.

    A refusal by Pyrite says what to do, and its place does not matter. An error of a library, or one that Python raised
    in Pyrite's own code, says too little without. Errors of files and networks name the file, and stay as they are.
    """
    said = " ".join(str(error).split())
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames or (isinstance(error, OSError) and error.filename is not None):
        return said or type(error).__name__
    frame, number = frames[-1]
    file = Path(frame.f_code.co_filename)
    if file.is_relative_to(HERE):
        if _raised(error):
            return said
        return f"{type(error).__name__}: {said} (at {file.relative_to(HERE.parent)}:{number}; --debug shows the rest)"
    library = _library(file)
    if library is None:
        return said
    return f"{said or type(error).__name__} (in {library} at {file.name}:{number}; --debug shows the traceback)"


def _raised(error: BaseException) -> bool:
    """Whether the last line of an error's traceback is a `raise`, not a call that Python refused."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return bool(trace) and trace.tb_frame.f_code.co_code[trace.tb_lasti] == RAISE


def _library(file: Path) -> str | None:
    """The library that a file belongs to, None for a file that is nobody's."""
    for folder in LIBRARIES:
        if file.is_relative_to(folder):
            return file.relative_to(folder).parts[0].removesuffix(".py")
    return str(file) if str(file).startswith("<frozen") else None
