"""Spec strings: "dpo(beta=0.3)", "mine.py:my_loss(tau=2)", "package.module:fn()" -> a function ready for data.

The module is the registry and the signature is the schema: what `members` lists is what a name may be,
keyword-only parameters are the options, and values are literals, never code. What comes before the options is the data:

    losses          loss(pair: PairLogps, *, ...) -> one value a pair, (B,), with a gradient
    reward_losses   loss(chosen (B,), rejected (B,), *, ...) -> one value a pair, (B,), with a gradient
    ensembles       combine(scores (E, N), *, ...) -> one score an answer, (N,)
    selection       selector(margins (E, B), generator=None, *, ...) -> one priority a pair, (B,)
    scorers         gold(prompts, responses, *, ...) -> one score a response, N numbers
    judges          judge(prompts, a, b, *, ...) -> P(a beats b) of each pair, N numbers from 0 to 1, NaN for no verdict
    lr_schedulers   scheduler(lr, step, total, *, ...) -> the learning rate of a step
    optimizers      optimizer(parameters, *, ...) -> a torch.optim.Optimizer
    samplers        sampler(*, ...) -> a pyrite.math.samplers.Sampler
    schedules       schedule(*, ...) -> a pyrite.feedback.schedules.Schedule
    live_rewards    annotator(*, ...) -> a function (players, seed) -> with scores(responses), learners, and
                    learn(pairs, seed=), of responses of which every other one is the chosen one

A function of options alone makes the part: what it returns is called with the data.

A part of the user's own, named by its file, is held to this table. Losses, ensembles, selectors and learning rates are
tried on a few numbers when they are named, before a model is loaded. A gold or a judge may cost money: naming it calls
nothing, and its answers are checked at every call. While such code runs, what it prints goes to standard error, it has
random numbers of its own, and torch's modes, default type and device, and the current folder are afterwards what they
were before.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import dis
import functools
import hashlib
import importlib
import importlib.util
import inspect
import io
import os
import pickle
import random
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrite.math import ranges, seeds
from pyrite.math.logps import toy_pairs

# Errors of others -----------------------------------------------------------------------------------------------------

HERE = Path(__file__).parents[1]
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


def _last_line(error: BaseException | None, file: str | Path) -> str:
    """ ":12", the last line of a file that an error passed; "" if it passed none."""
    frames = traceback.walk_tb(error.__traceback__ if error else None)
    lines = [line for frame, line in frames if Path(frame.f_code.co_filename).absolute() == Path(file).absolute()]
    return f":{lines[-1]}" if lines else ""


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


# Parts of the user's own ----------------------------------------------------------------------------------------------

Function = Callable[..., Any]
EXACT = 2**24  # whole numbers up to here are float32 numbers


class PartError(ValueError):
    """A part of the user's own raised, or returned something else than it must; the message names its file and line."""


@dataclass
class Own:
    """A part of the user's own: its file and name as typed, and its own random numbers."""

    where: str
    name: str
    file: str = ""
    line: int = 0
    state: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, where: str, name: str, function: Function) -> Own:
        """The own part of a function."""
        code = getattr(inspect.unwrap(getattr(function, "func", function)), "__code__", None)
        return cls(where, name, code.co_filename if code else "", code.co_firstlineno if code else 0)

    def fault(self, what: str, *, error: BaseException | None = None) -> PartError:
        """An error that names the part and the line: of the error if it arose in the part's file, else of the part."""
        line = _last_line(error, self.file) or (f":{self.line}" if self.line else "")
        return PartError(f"{self.where}{line}, {self.name}(): {what}")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run the user's code: nothing it does to its surroundings lasts, and its errors are one line."""
        try:
            with undisturbed(self.state, self.name):
                yield
        except PartError:
            raise
        except (Exception, SystemExit) as error:
            if type(error).__module__.startswith("pyrite."):
                raise  # a stop of Pyrite's own, such as a judge without money
            said = " ".join(str(error).split())
            raise self.fault(f"{type(error).__name__}{': ' if said else ''}{said}", error=error) from error


class Contract(NamedTuple):
    """What a kind of part is given and must return, and on which numbers it is tried."""

    data: tuple[str, ...] = ()
    returns: str = ""
    read: Callable[[Own, Any, tuple[Any, ...]], Any] | None = None
    trial: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    instance: str = ""
    late: tuple[str, ...] = ()


def held(own: Own, make: Callable[[], Any], registry: ModuleType | Mapping[str, Function]) -> Any:
    """Make the user's part and hold it to the contract of its kind.

    registry: the module of the kind, such as pyrite.math.losses. A part without a contract is guarded only.
    """
    kind = getattr(registry, "__name__", "")
    contract = CONTRACTS.get(kind.rpartition(".")[2], Contract())
    with own.running():
        made = make()
    if contract.instance:
        wanted = getattr(registry, contract.instance)
        if isinstance(made, functools.partial):
            raise own.fault(f"takes {inspect.signature(made)}; it must take options only, after a star, (*, share=0.5)")
        if not isinstance(made, wanted):
            raise own.fault(f"returns {_called(made)}; return a {kind}.{contract.instance}")
        return made
    if not callable(made):
        words = f"the function to call with ({', '.join(contract.data)})" if contract.data else "the function to call"
        raise own.fault(f"takes options only, so it must return {words}; it returns {_called(made)}")
    if contract.read is None:
        return _watched(own, made, contract)
    _check_arity(own, made, contract)
    function = _watched(own, made, contract)
    if contract.trial:
        data, late = contract.trial()
        answer = function(*data, **late)
        bad = (~answer.isfinite()).nonzero()
        if len(bad):
            value = answer[int(bad[0])].item()
            raise own.fault(f"returns {value} for ordinary numbers; every value must be finite ({contract.returns})")
    return function


def _watched(own: Own, made: Function, contract: Contract) -> Function:
    """The function, with its data protected from changes and its answers checked."""

    @functools.wraps(made)
    def function(*data: Any, **late: Any) -> Any:
        given = tuple(_lent(value) for value in data)
        before = [(tensor, tensor._version) for tensor in _tensors(given) if not tensor.is_inference()]
        with own.running():
            answer = made(*given, **late)
            if inspect.iscoroutine(answer):
                answer.close()  # so that nobody waits for it
        if any(tensor._version != version for tensor, version in before):
            raise own.fault("changes what it is given in place; work on a copy, such as x.clone()")
        return contract.read(own, answer, given) if contract.read else answer

    return function


def _lent(value: Any) -> Any:
    """A copy of data whose changes could not be noticed: lists, and tensors made in inference mode."""
    if isinstance(value, list):
        return list(value)
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            if not isinstance(item, str):
                yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from _tensors(getattr(value, part.name))


def _check_arity(own: Own, made: Function, contract: Contract) -> None:
    try:
        inspect.signature(made).bind(*contract.data, **dict.fromkeys(contract.late))
    except TypeError as error:
        example = f"def {own.name}({', '.join(contract.data)}, *, option=1.0)"
        raise own.fault(f"{error}; it is called with ({', '.join(contract.data)}): write {example}") from None
    except ValueError:
        return  # a builtin without a signature


# What is returned ---------------------------------------------------------------------------------------------------


def _loss(own: Own, answer: Any, data: tuple[Any, ...]) -> Tensor:
    """One value a pair, with a gradient if the data have one."""
    like = data[0] if isinstance(data[0], Tensor) else data[0].chosen.sum
    returns = "return one value a pair, shape (B,)"
    if isinstance(answer, (list, tuple)) and answer and all(isinstance(one, Tensor) for one in answer):
        answer = torch.stack(list(answer)) if all(one.ndim == 0 for one in answer) else answer
    if not isinstance(answer, Tensor):
        raise own.fault(f"returns {_called(answer)}; {returns}, as a tensor computed from the data")
    if answer.ndim == 0:
        raise own.fault(f"returns one number for the whole batch; {returns}")
    if answer.shape != like.shape:
        raise own.fault(f"returns shape {tuple(answer.shape)} for {len(like)} pairs; {returns}")
    if not answer.is_floating_point():
        raise own.fault(f"returns {str(answer.dtype).removeprefix('torch.')}, which has no gradient; {returns}")
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors(data))
    if learns and not answer.requires_grad:
        raise own.fault("returns values without a gradient; compute them from the data, without detach() or no_grad()")
    return answer if answer.device == like.device else answer.to(like.device)


def _score_a_column(own: Own, answer: Any, data: tuple[Any, ...]) -> Tensor:
    values = _numbers(own, answer, data[0].shape[1], "return one number a column, shape (N,)").to(data[0].device)
    bad = (~values.isfinite()).nonzero()
    if len(bad) and bool(data[0].isfinite().all()):
        raise own.fault(f"returns {values[int(bad[0])].item()}; every value must be finite")
    return values


def _score_a_row(own: Own, answer: Any, data: tuple[Any, ...]) -> Tensor:
    return _numbers(own, answer, len(data[0]), "return one number for each, N in all")


def _numbers(own: Own, answer: Any, n: int, returns: str) -> Tensor:
    """N numbers from a tensor, a list or an array. Whole numbers too large for float32 stay exact, as float64."""
    if not isinstance(answer, Tensor) and hasattr(answer, "__array__") and not isinstance(answer, (str, bytes)):
        answer = answer.tolist()
    if isinstance(answer, (list, tuple)):
        items = [item.item() if _single(item) else item for item in answer]
        wrong = next((i for i, item in enumerate(items) if not isinstance(item, (bool, int, float))), None)
        if wrong is not None:
            raise own.fault(f"returns {_called(items[wrong])} at place {wrong + 1}; {returns}")
        answer = torch.tensor(items, dtype=_width(items))
    if not isinstance(answer, Tensor):
        raise own.fault(f"returns {_called(answer)}; {returns}")
    if answer.ndim == 0:
        raise own.fault(f"returns one number for {n}; {returns}")
    if answer.shape != (n,):
        said = f"{len(answer)} values" if answer.ndim == 1 else f"shape {tuple(answer.shape)}"
        raise own.fault(f"returns {said} for {n}; {returns}")
    if answer.is_complex() or answer.is_meta:
        raise own.fault(f"returns {'complex numbers' if answer.is_complex() else 'no values'}; {returns}")
    answer = answer.detach()
    return answer if answer.is_floating_point() else answer.to(_width(answer.tolist()))


def _single(item: Any) -> bool:
    return not isinstance(item, (bool, int, float, str)) and hasattr(item, "item") and getattr(item, "ndim", 1) == 0


def _width(values: Sequence[Any]) -> torch.dtype:
    large = any(isinstance(value, int) and abs(value) > EXACT for value in values)
    return torch.float64 if large else torch.float32


def _rate(own: Own, answer: Any, data: tuple[Any, ...]) -> float:
    value = answer.item() if _single(answer) else answer
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise own.fault(f"returns {_called(value)}; return the learning rate of a step, a number of 0 or more")
    return float(value)


def _optimizer(own: Own, answer: Any, data: tuple[Any, ...]) -> torch.optim.Optimizer:
    if not isinstance(answer, torch.optim.Optimizer):
        raise own.fault(f"returns {_called(answer)}; return a torch.optim.Optimizer of the parameters")
    return answer


def _maker(own: Own, answer: Any, data: tuple[Any, ...]) -> Any:
    missing = [name for name in ("scores", "learn", "learners") if not hasattr(answer, name)]
    if missing:
        raise own.fault(f"makes {_called(answer)} without {' and '.join(missing)}; see pyrite.training.live_rewards")
    return CheckedAnnotator(own, answer)


@dataclass(frozen=True)
class CheckedAnnotator:
    """An annotator of the user's own, its answers checked."""

    own: Own
    inner: Any

    @property
    def schedule(self) -> str:
        """When it buys labels and learns; even() unless it says otherwise."""
        return getattr(self.inner, "schedule", "even()")

    @property
    def learners(self) -> Sequence[Any]:
        """Of its members, for checkpoints."""
        return self.inner.learners

    def scores(self, answers: Sized) -> Tensor:
        """(E, N), finite."""
        with self.own.running():
            found = self.inner.scores(answers)
        if not (isinstance(found, Tensor) and found.ndim == 2 and found.shape[1] == len(answers)):
            shape = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else _called(found)
            raise self.own.fault(f"scores() returns {shape}; return a tensor (E, N), N = {len(answers)} answers")
        if not found.isfinite().all():
            raise self.own.fault("scores() returns a value that is not finite")
        return found.detach()

    def learn(self, labels: Sized, *, seed: int) -> dict[str, float]:
        """Means over its updates, by name."""
        with self.own.running():
            found = self.inner.learn(labels, seed=seed)
        if not isinstance(found, Mapping):
            raise self.own.fault(f"learn() returns {_called(found)}; return numbers by name, such as {{'loss': 0.5}}")
        return dict(found)


def _called(value: Any) -> str:
    """What a message calls a value."""
    if value is None:
        return "None"
    if isinstance(value, str):
        return f"text ({value!r:.30})"
    if isinstance(value, (bool, int, float)):
        return f"one number ({value})"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


# The kinds of parts -------------------------------------------------------------------------------------------------


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


PAIR = "return one value a pair, shape (B,)"
CONTRACTS = {
    "losses": Contract(("pair",), PAIR, _loss, lambda: ((toy_pairs(learning=True),), {})),
    "reward_losses": Contract(
        ("chosen", "rejected"), PAIR, _loss, lambda: ((_random(6).requires_grad_(), _random(6).requires_grad_()), {})
    ),
    "ensembles": Contract(
        ("scores",), "one score an answer, shape (N,)", _score_a_column, lambda: ((_random(3, 6),), {})
    ),
    "lr_schedulers": Contract(
        ("lr", "step", "total"), "the learning rate of a step", _rate, lambda: ((1e-3, 0, 10), {})
    ),
    "optimizers": Contract(("parameters",), "a torch.optim.Optimizer", _optimizer),
    "selection": Contract(
        ("margins",),
        "one priority a pair, shape (B,)",
        _score_a_column,
        lambda: ((_random(3, 6),), {"generator": torch.Generator().manual_seed(0)}),
        late=("generator",),
    ),
    "scorers": Contract(("prompts", "responses"), "one score a response", _score_a_row),
    "judges": Contract(("prompts", "a", "b"), "P(a beats b) of each pair", _score_a_row),
    "samplers": Contract(instance="Sampler"),
    "schedules": Contract(instance="Schedule"),
    "live_rewards": Contract(("players", "seed"), "an annotator", _maker),
}


# Surroundings -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def undisturbed(state: dict[str, Any], name: str) -> Iterator[None]:
    """Run code and restore its surroundings afterwards. `state` keeps the code's own random numbers."""
    dtype, device, folder = torch.get_default_dtype(), torch.get_default_device(), os.getcwd()
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    before = _random_state()
    _set_random_state(state or _seeded(seeds.derive(0, "own part", name)))
    try:
        with contextlib.redirect_stdout(sys.stderr), torch.inference_mode(inference), torch.set_grad_enabled(grad):
            yield
    finally:
        state.update(_random_state())
        _set_random_state(before)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        os.chdir(folder)


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "torch": torch.get_rng_state(), "numpy": np.random.get_state()}
    return state | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_initialized() else {})


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def _seeded(seed: int) -> dict[str, Any]:
    """The random numbers that a part starts with."""
    return {
        "python": random.Random(seed).getstate(),
        "torch": torch.Generator().manual_seed(seed % 2**63).get_state(),
        "numpy": np.random.RandomState(seed % 2**32).get_state(),
    }


# Spec strings -------------------------------------------------------------------------------------------------------

Registry = ModuleType | Mapping[str, Function]

_SPEC = re.compile(r"\s*(?:(?P<where>[^()]+):)?\s*(?P<name>[^\W\d]\w*)\s*(?P<call>\(.*)?", re.DOTALL)
_EXAMPLE = 'write "name", "name(option=value)", "file.py:name(option=value)" or "package.module:name()"'


class Member(NamedTuple):
    """One entry of `pyrite list`.

    options: their defaults, inspect.Parameter.empty if required. ranges: what they may be, in words.
    """

    name: str
    options: dict[str, Any]
    summary: str
    ranges: dict[str, str]


@dataclass(frozen=True)
class ReadyPart:
    """A function with its options fixed, ready for data. It prints as the spec that makes it again."""

    name: str
    options: Mapping[str, Any]
    function: Function
    where: str = ""

    def __call__(self, *data: Any, **late: Any) -> Any:
        return self.function(*data, **late)

    @property
    def own(self) -> bool:
        """Whether it is the user's own, from a file or a module of theirs."""
        return bool(self.where) and self.where.partition(".")[0] != "pyrite"

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.where}{':' if self.where else ''}{self.name}({options})"


def part(spec: str, registry: Registry) -> ReadyPart:
    """The function a spec string names, its options checked and fixed; one's own is held to `pyrite.core.specs`.

    A bare name is looked up in `registry`, a module or a mapping of names; "path.py:name" in that file and
    "package.module:name" in that module, which are imported. A function of options alone is a factory: it
    is called, and what it returns is the part. Raises ValueError, in one line, for a spec that cannot be
    read, an unknown name or option (with the nearest), or a value that is not what the annotation says.

    >>> import pyrite.math.losses
    >>> part("dpo(beta=0.3)", pyrite.math.losses)
    dpo(beta=0.3)
    """
    if spec.startswith(GIVEN):
        return _given(spec, registry)
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ValueError(f"cannot read {spec!r}: {_EXAMPLE}")
    where, name = (match["where"] or "").strip(), match["name"]
    options = _options(spec, match["call"] or "()", match.start("call"))
    module = _load(where) if where else None
    functions = _functions(module or registry)
    if name not in functions:
        place = f" in {where}" if where else ""
        hint = _no_function(name, module) or getattr(module or registry, "GONE", {}).get(name)
        raise ValueError(f"unknown name {name!r}{place}: {hint or _suggest(name, functions)}")
    function = functions[name]
    _check_options(function, options)
    if not where or function.__module__.partition(".")[0] == "pyrite":
        made = _ready(function, options)
        verify = getattr(made, "verify", None)
        if verify:
            verify()  # a part that asks a model refuses a broken one now, and loads it when it is asked
        return ReadyPart(name, options, made, where)
    own = Own.of(where, name, function)
    return ReadyPart(name, options, held(own, lambda: _ready(function, options), registry), where)


GIVEN = "given:"
_given_functions: dict[str, Function] = {}


def given(function: Function) -> str:
    """A spec string for a function in memory: its name, and a hash of its source, its options and what it holds.

    It holds its closure, its defaults, and the globals it reads that are plain values or own functions. The hash is
    the same in every process. Raises ValueError for a function that holds what cannot be hashed so.
    """
    name = getattr(getattr(function, "func", function), "__name__", type(function).__name__)
    try:
        spec = f"{GIVEN}{name}-{hashlib.sha256(_pickled(function)).hexdigest()[:16]}"
    except Exception as error:  # whatever an object raises that cannot be pickled
        raise ValueError(
            f"{name}() holds something that has no name in the next process ({' '.join(str(error).split())}); let it "
            'hold plain values, or write it in a file and give "mine.py:name()"'
        ) from error
    _given_functions[spec] = function
    return spec


class _Pickler(pickle.Pickler):
    """Pickles by content: functions and own classes by their code, tensors by their numbers, sets in order.

    Of a cached function, the function within counts, not what it remembers. The source alone would not tell two lambdas
    of one line apart, so what Python made of it counts too.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.inside: list[Any] = []

    def persistent_id(self, thing: Any) -> Any:
        match thing:
            case FunctionType() | type() if thing in self.inside:
                return "again", thing.__qualname__  # a function that calls itself, the class of a method
            case FunctionType():
                self.inside.append(thing)
                held = [cell.cell_contents for cell in thing.__closure__ or ()]
                code = _code(thing), _compiled(thing.__code__)
                return "function", code, held, thing.__defaults__, thing.__kwdefaults__, _globals(thing)
            case functools._lru_cache_wrapper():
                return "cached", thing.__wrapped__
            case type() if thing.__module__ != "builtins":
                self.inside.append(thing)
                own = not _library(Path(getattr(sys.modules.get(thing.__module__), "__file__", None) or "notebook"))
                methods = [value for value in vars(thing).values() if own and inspect.isfunction(value)]
                return "class", thing.__module__, thing.__qualname__, methods
            case ModuleType():
                return "module", thing.__name__
            case Tensor():
                flat = thing.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                return "tensor", str(thing.dtype), tuple(thing.shape), flat.numpy().tobytes()
            case set() | frozenset():
                return "set", sorted(map(_pickled, thing))
        return None


def _pickled(thing: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(thing)
    return file.getvalue()


def _code(function: Any) -> str:
    """The source of a function; empty for code that was typed."""
    try:
        return inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return ""


def _globals(function: FunctionType) -> list[tuple[str, Any]]:
    """The globals that a function reads: numbers, texts, tuples, tensors and own functions, such as BETA = 0.1.

    Lists and dictionaries are left out, since a function may fill them as it works, and so are names it assigns.
    """

    def read(code: CodeType) -> set[str]:
        steps = [(step.opname, step.argval) for step in dis.get_instructions(code)]
        found = {name for step, name in steps if step == "LOAD_GLOBAL"}
        found |= {name for one in code.co_consts if isinstance(one, CodeType) for name in read(one)}
        return found - {name for step, name in steps if step == "STORE_GLOBAL"}

    known = {name: function.__globals__[name] for name in sorted(read(function.__code__) & set(function.__globals__))}
    return [(name, value) for name, value in known.items() if _lasting(value)]


def _lasting(value: Any) -> bool:
    if isinstance(value, FunctionType):
        return not _library(Path(value.__code__.co_filename))
    return value is None or isinstance(value, (bool, int, float, str, bytes, tuple, Tensor))


def _compiled(code: CodeType) -> tuple[Any, ...]:
    constants = [_compiled(one) if isinstance(one, CodeType) else one for one in code.co_consts]
    return code.co_code, code.co_names, constants


def _given(spec: str, registry: Registry) -> ReadyPart:
    """The part of a function that a job was given as an object. A user's own is held to the contract of its kind."""
    if spec not in _given_functions:
        raise ValueError(f"{spec} was a function in the memory of another process: give it again")
    function = _given_functions[spec]
    inner = getattr(function, "func", function)
    if getattr(inner, "__module__", "").partition(".")[0] == "pyrite":
        return ReadyPart(inner.__name__, getattr(function, "keywords", {}), function)
    name = spec.removeprefix(GIVEN)
    own = Own.of("", name, function)
    shown = replace(own, where=own.file, name=name.rpartition("-")[0])
    return ReadyPart(name, {}, held(shown, lambda: function, registry), GIVEN)


def members(registry: Registry) -> list[Member]:
    """The functions that can be named: those of a module's `__all__`, or its own public ones, sorted by name."""
    found = []
    for name, function in sorted(_functions(registry).items()):
        options, hints = _defaults(function), ranges.hints(function)
        said = {option: words for option in options if (words := ranges.words(hints.get(option, Any)))}
        found.append(Member(name, options, (inspect.getdoc(function) or "").partition("\n")[0], said))
    return found


def signature(function: Function) -> str:
    """A function and its options as a spec has them: "dpo(beta=0.1, label_smoothing=0.0)"."""
    empty = inspect.Parameter.empty
    options = (name if value is empty else f"{name}={value!r}" for name, value in _defaults(function).items())
    return f"{function.__name__}({', '.join(options)})"


def _options(spec: str, call: str, start: int) -> dict[str, Any]:
    """The keyword options of "(name=value, ...)", which begins at `start` of the spec."""
    try:
        node = ast.parse(f"f{call}", mode="eval").body
    except SyntaxError as error:
        at = start + max((error.offset or 2) - 2, 0)  # offset counts from 1, and from the f put in front
        raise ValueError(f"cannot read {spec!r} at {spec[at:] or 'its end'!r}: {_EXAMPLE}") from None
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError(f"cannot read {spec!r} beyond one pair of parentheses: {_EXAMPLE}")
    if node.args:
        raise ValueError(f"{spec!r}: {ast.unparse(node.args[0])!r} has no name; {_EXAMPLE}")
    options: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in options:
            raise ValueError(f"{spec!r}: give every option once, by its name, not {ast.unparse(keyword)!r}")
        try:
            options[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError):
            raise ValueError(
                f"{spec!r}: {ast.unparse(keyword)} is no plain value; "
                "give a number, True, False, None, a list, or text in quotes"
            ) from None
    return options


def _load(where: str) -> ModuleType:
    """The module at a path ending in .py, or of a dotted name."""
    path = Path(where)
    if path.suffix == ".py" and not path.is_file():
        raise ValueError(f"no file {where}: give its path from the current folder, {Path.cwd()}")
    try:
        with undisturbed({}, where):
            return _load_file(path) if path.suffix == ".py" else _import(where)
    except ModuleNotFoundError as error:
        hint = "" if error.name != where else f'; for a file of yours write "{where}.py:name()"'
        raise ValueError(f"cannot import {where}: no module named {error.name!r}{_place(error, path)}{hint}") from None
    except (Exception, SystemExit) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"cannot import {where}: {said}{_place(error, path)}") from error


def _place(error: BaseException, path: Path) -> str:
    """ " (mine.py, line 5)": where the import of a file stopped; a SyntaxError says it itself."""
    line = "" if isinstance(error, SyntaxError) else _last_line(error, path)
    return f" ({path.name}, line {line[1:]})" if line else ""


def _import(where: str) -> ModuleType:
    """A module by its dotted name, or a module that a package offers under that name, such as `pyrite.toy`."""
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        package, _, name = where.rpartition(".")
        if error.name != where or not package:
            raise
        offered = getattr(importlib.import_module(package), name, None)
        if not isinstance(offered, ModuleType):
            raise
        return offered


def _load_file(path: Path) -> ModuleType:
    name = f"pyrite_part_{re.sub(r'[^0-9a-zA-Z]', '_', str(path.resolve()))}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and type hints of the file look it up by name
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _no_function(name: str, module: ModuleType | None) -> str:
    """A hint if a name of the user's file is not a function."""
    value = vars(module).get(name) if module and not name.startswith("_") else None
    if inspect.isclass(value) and value.__module__ == getattr(module, "__name__", ""):
        return f"{name} is a class; write a function that makes one: def make(*, option=1): return {name}(option)"
    if callable(value) and not inspect.isclass(value) and not hasattr(module, "__all__"):
        return f"{name} is not a function of this file; write one that calls it"
    return ""


def _functions(registry: Registry) -> dict[str, Function]:
    if not isinstance(registry, ModuleType):
        return dict(registry)
    exported = getattr(registry, "__all__", None)
    found = {name: vars(registry)[name] for name in exported or vars(registry) if name in vars(registry)}
    return {
        name: value
        for name, value in found.items()
        if inspect.isfunction(value)
        and (exported or (not name.startswith("_") and value.__module__ == registry.__name__))
    }


def _defaults(function: Function) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _ready(function: Function, options: dict[str, Any]) -> Function:
    """The function with its options fixed or, of a factory, what it makes of them."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is not p.KEYWORD_ONLY for p in parameters):
        return partial(function, **options)
    for p in parameters:
        if p.default is p.empty and p.name not in options:
            raise ValueError(f"{function.__name__} needs the option {p.name!r}; it is {signature(function)}")
    return function(**options)


def _check_options(function: Function, options: dict[str, Any]) -> None:
    known = _defaults(function)
    hints = ranges.hints(function)
    for name, value in options.items():
        if name in inspect.signature(function).parameters and name not in known:
            raise ValueError(
                f"{function.__name__} takes {name} by position; put a star before its options: "
                f"def {function.__name__}(..., *, {name}=...)"
            )
        if name not in known:
            raise ValueError(
                f"{function.__name__} has no option {name!r}: {_suggest(name, known)}; it is {signature(function)}"
            )
        wrong = None if value == known[name] else ranges.fault(value, hints.get(name, Any))
        if wrong:
            refused = ranges.refusal(f"{function.__name__}: option {name}={value!r}", wrong)
            raise ValueError(f"{refused}; it is {signature(function)}")


def _suggest(name: str, known: Iterable[str]) -> str:
    """ "did you mean dpo? known: dpo, ipo"."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{guess}known: {', '.join(names) or 'none'}"
