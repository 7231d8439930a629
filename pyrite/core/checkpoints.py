"""Model folders as files: found on this machine or on the Hub, and refused if they cannot hold a whole model.

Weights are read from safetensors alone: a pickle can run any code, so none is ever opened. Nothing is loaded here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import safe_open

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ABOUT = "adapter_model.safetensors", "adapter_config.json"
BASE = "base.json"  # beside adapters: which weights they were trained on
PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")  # of a Hub model, beside its weights
WHOLE, BLOCK = 4 << 20, 1 << 16  # bytes: a larger tensor is hashed by 64 blocks of this size


# Where it is ------------------------------------------------------------------------------------------------------


def place(path: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a model: the one named, or this machine's copy of a Hub model.

    Raises ValueError with the nearest name on disk if there is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(f"{path} is a file; give the folder of the model, {folder.parent}")
    if not _is_hub_name(str(path)):
        raise ValueError(f"{path}: there is no such folder{nearest(folder)}")
    return _from_hub(str(path), revision)


def adapter_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of a folder's adapters, None for a whole model. Raises ValueError if they name no base."""
    if not (folder / ABOUT).exists():
        return None
    about = read_json(folder / ABOUT)
    if not isinstance(about.get("base_model_name_or_path"), str) or not about["base_model_name_or_path"]:
        raise ValueError(f"{folder / ABOUT}: names no model below the adapters; add base_model_name_or_path")
    return about


def base_name(folder: Path) -> str | None:
    """The model below a folder's adapters, a folder as an absolute path. None for a whole model.

    A relative path is looked up from the current folder, then from the adapters'. Raises ValueError if it is gone.
    """
    about = adapter_settings(folder)
    if about is None:
        return None
    name = about["base_model_name_or_path"]
    for found in (Path(name).expanduser(), folder / name):
        if found.is_dir():
            return str(found.resolve())
    if _is_hub_name(name):
        return name
    raise ValueError(
        f"{folder}: the model below these adapters is not at {name}{nearest(name)}; if it was moved, "
        f"write its new place as base_model_name_or_path into {folder / ABOUT}"
    )


def name_of(path: str | Path) -> str:
    """A folder as an absolute path, so that it opens from everywhere; a Hub name as it is."""
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else str(path)


def _is_hub_name(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith((".", "~"))


@cache
def _from_hub(name: str, revision: str | None) -> Path:
    """The local copy of a Hub model, its safetensors alone. Without network, the copy that is there already.

    Asks the Hub once, without retries, so that a misspelled folder does not wait for a missing network.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        info = HfApi().model_info(name, revision=revision, timeout=(1.5, 10, 10, 10))  # type: ignore[arg-type]
    except Exception as error:  # no network, a proxy, an offline mode, a Hub that answers with an error
        try:
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            reason = first_line(error)
            known = isinstance(error, HfHubHTTPError) and error.response is not None
            why = "nor a model on the Hub" if known else "nor reachable on the Hub"
            raise ValueError(f"{name}: neither a folder here {why} ({reason}){nearest(name)}") from error
    names = {file.rfilename for file in info.siblings or ()}
    options: dict[str, Any] = {"revision": info.sha, "local_files_only": False}
    folder = Path(snapshot_download(name, allow_patterns=[*SMALL, WEIGHTS, ADAPTER], **options))
    if WEIGHTS not in names and INDEX in names:
        shards = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        snapshot_download(name, allow_patterns=shards, **options)
    return folder


def nearest(path: str | Path) -> str:
    """ "; did you mean 'runs/reward'?": the folder nearest to a path that is not there, or nothing."""
    parts = Path(path).expanduser().parts
    gone = next((i for i in range(len(parts)) if not Path(*parts[: i + 1]).exists()), None)
    if gone is None:
        return ""
    above, part, rest = Path(*parts[:gone]), parts[gone], parts[gone + 1 :]
    try:
        names = [found.name for found in above.iterdir() if found.is_dir()]
    except OSError:
        return ""
    near = [above / name for name in difflib.get_close_matches(part, names, n=3)]
    whole = [one.joinpath(*rest) for one in near if one.joinpath(*rest).is_dir()]
    return f"; did you mean {str((whole or near)[0])!r}?" if near else ""


# What is in it ----------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The files of a whole model's weights, all readable and with every tensor that the index names.

    Raises ValueError for a folder without weights, a missing or broken file, and pickled weights.
    """
    config = folder / "config.json"
    if not config.exists():
        raise ValueError(f"{folder}: no model could be loaded: no config.json here{inside(folder)}")
    read_json(config)
    if (folder / WEIGHTS).exists():
        shapes(folder / WEIGHTS)
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        _refuse_pickles(folder, f"its config and {WEIGHTS}")
        raise ValueError(f"{folder}: no weights here (no {WEIGHTS} and no {INDEX}); save or copy the model again")
    promised = read_json(folder / INDEX).get("weight_map")
    if not isinstance(promised, dict) or not promised:
        raise ValueError(f"{folder / INDEX}: names no tensors (no weight_map); save or copy the model again")
    files = sorted({str(file) for file in promised.values()})
    if pickled := [file for file in files if not file.endswith(".safetensors")]:
        raise ValueError(f"{folder / INDEX}: names {pickled[0]}, which is no safetensors file and is not opened")
    if gone := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(
            f"{folder}: {len(gone)} of {len(files)} files of its weights are missing ({listed(gone)}); "
            "copy the model again, whole"
        )
    held = {file: set(shapes(folder / file)) for file in files}
    if absent := [name for name, file in promised.items() if name not in held[str(file)]]:
        raise ValueError(
            f"{folder / INDEX}: {len(absent)} of its tensors are not in the files it names ({listed(absent)}); "
            "save or copy the model again"
        )
    return [folder / file for file in files]


def adapter_file(folder: Path) -> Path:
    """The file of a folder's adapters, readable. Raises ValueError without one."""
    file = folder / ADAPTER
    if not file.exists():
        _refuse_pickles(folder, ADAPTER)
        raise ValueError(f"{folder}: no {ADAPTER} beside {ABOUT}; save the adapters as safetensors, or copy them again")
    if not shapes(file):
        raise ValueError(f"{file}: holds no tensors, so the model would be the base; copy or save it again")
    return file


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a safetensors file's tensors by name. Raises ValueError for a file that is broken."""
    try:
        with safe_open(file, "pt") as opened:
            found = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:
        what = "empty" if file.stat().st_size == 0 else "cut short or damaged"
        raise ValueError(f"{file}: is {what}, no safetensors file ({first_line(error)}); copy it again") from error
    return found


def tensors(file: Path) -> Iterator[tuple[str, Any]]:
    """The tensors of a safetensors file, one at a time."""
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118, no dict
            yield name, opened.get_tensor(name)


def config(folder: Path) -> Any:
    """A model's own settings, as transformers reads them. Raises ValueError if they are no model's."""
    from transformers import AutoConfig

    read_json(folder / "config.json")
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(
            f"{folder}: no model could be loaded: its config.json is no model's ({first_line(error)})"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, with the file's name, for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: there is no such file; save or copy the model again") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is damaged, no JSON ({first_line(error)}); copy it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: is damaged, {type(found).__name__} in place of an object; copy it again")
    return found


def listed(names: Iterable[str], *, most: int = 3) -> str:
    """The first few of some names.

    >>> listed(["a", "b", "c", "d"])
    'a, b, c, ...'
    """
    found = sorted(names)
    return ", ".join(found[:most]) + (", ..." if len(found) > most else "")


def _refuse_pickles(folder: Path, wanted: str) -> None:
    pickles = sorted(
        file.name for pattern in PICKLES for file in folder.glob(pattern) if file.name != "training_args.bin"
    )
    if not pickles:
        return
    if (folder / ABOUT).exists():
        way = (
            'python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{pickles[0]}', weights_only=True), '{ADAPTER}')\""
        )
    else:
        way = (
            'python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('OLD').save_pretrained('NEW')\" (and copy its tokenizer)"
        )
    raise ValueError(
        f"{folder}: its weights are pickled ({listed(pickles)}), and a pickle can run any code, so it is never opened; "
        f"convert it to safetensors ({wanted}) if you trust it: {way}"
    )


def inside(folder: Path) -> str:
    """A hint if the folder is that of a run, which holds a model."""
    found = next((name for name in ("model", "best", "member_0") if (folder / name).is_dir()), None)
    return f"; did you mean {str(folder / found)!r}?" if found else ""


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Which weights ----------------------------------------------------------------------------------------------------


def identity(folder: Path) -> str:
    """Hash of a whole model's weights by name, type, shape and content, whatever files they lie in.

    Of a tensor beyond 4 MiB 64 blocks are read, so that it takes moments for any model.
    """
    files = [(file.resolve(), file.stat()) for file in weight_files(folder)]
    return _identity(tuple((str(file), about.st_size, about.st_mtime_ns) for file, about in files))


def check_base(folder: Path, base: str) -> str:
    """Hash of the model below a folder's adapters. Raises ValueError if they were trained on other weights."""
    found = identity(place(base, revision=(adapter_settings(folder) or {}).get("revision")))
    said = read_json(folder / BASE).get("weights") if (folder / BASE).exists() else None
    if said is not None and said != found:
        raise ValueError(
            f"{folder}: these adapters were trained on other weights than those now at {base} "
            f"({said} then, {found} now); give them their own base by base_model_name_or_path in {folder / ABOUT}"
        )
    return found


def write_base(folder: Path, name: str, weights: str) -> None:
    """Write beside adapters which weights they were trained on."""
    (folder / BASE).write_text(json.dumps({"base": name, "weights": weights}, indent=1) + "\n")


@cache
def _identity(files: tuple[tuple[str, int, int], ...]) -> str:
    with ThreadPoolExecutor() as pool:
        digests = sorted(digest for found in pool.map(_digests, (file for file, *_ in files)) for digest in found)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def _digests(file: str) -> list[bytes]:
    """A hash of every tensor, by the layout of the format: length of the header, header, data."""
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        found = []
        for name, about in header.items():
            if name != "__metadata__":
                digest = hashlib.sha256(json.dumps([name, about["dtype"], about["shape"]]).encode())
                first, last = (begin + offset for offset in about["data_offsets"])
                step = BLOCK if last - first <= WHOLE else (last - first - BLOCK) // 63
                for at in range(first, last, step):
                    digest.update(data[at : min(at + BLOCK, last)])
                found.append(digest.digest())
        return found
