"""What a part of one's own is given and must return, kind by kind; it is held to that at every call.

A part of Pyrite is a function in a module; one's own is a function in a file, named as "mine.py:my_loss(beta=0.1)".
Its options are keyword-only. What comes before them is the data:

    losses          loss(pair: PairLogps, *, ...) -> one value a pair, (B,), with a gradient
    reward_losses   loss(chosen (B,), rejected (B,), *, ...) -> one value a pair, (B,), with a gradient
    ensembles       combine(scores (E, N), *, ...) -> one score an answer, (N,)
    selectors       selector(margins (E, B), generator=None, *, ...) -> one priority a pair, (B,)
    golds           gold(prompts, responses, *, ...) -> one score a response, N numbers
    judges          judge(prompts, a, b, *, ...) -> P(a beats b) of each pair, N numbers from 0 to 1, NaN for no verdict
    samplers        sampler(*, ...) -> a pyrite.samplers.Sampler
    schedules       schedule(*, ...) -> a pyrite.schedules.Schedule
    discriminators  discriminator(*, ...) -> a function (players, seed) -> with scores(answers), learn(labels, seed=),
                    learners

A function of options alone makes the part: what it returns is called with the data. Losses, reward losses, ensembles
and selectors are tried on a few numbers when they are named, before any model is loaded. A gold or a judge may cost
money: naming it calls nothing. A job asks it about two texts before it begins, unless its answers are paid for (there
is a budget, a price or a ledger), and checks what it returns at every call. A NaN of a judge is no verdict; a gold must
score every text.

While one's own code runs, what it prints goes to standard error, it has random numbers of its own, and torch's modes,
default type and device, and the current folder are afterwards what they were before.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrite import seeds
from pyrite.losses.needs import toy_pairs

__all__ = ["CONTRACTS", "Own", "PartError", "held", "undisturbed"]

Function = Callable[..., Any]
EXACT = 2**24  # whole numbers up to here are float32 numbers


class PartError(ValueError):
    """A part of the user's own raised, or returned something else than it must; the message names its file and line."""


@dataclass
class Own:
    """A part of the user's own: where it stands, as typed, and its random numbers, which are nobody else's."""

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
        lines = [number for frame, number in _frames(error) if frame.f_code.co_filename == self.file]
        line = lines[-1] if lines else self.line
        return PartError(f"{self.where}{f':{line}' if line else ''}, {self.name}(): {what}")

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
    """One kind of part: the names of its data, what its answer must be, and how it is tried, if it is."""

    data: tuple[str, ...] = ()
    returns: str = ""
    read: Callable[[Own, Any, tuple[Any, ...]], Any] | None = None
    trial: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    instance: str = ""
    late: tuple[str, ...] = ()


def held(own: Own, make: Callable[[], Any], registry: ModuleType | Mapping[str, Function]) -> Any:
    """What `make` makes of the user's function and its options, held to the contract of its kind; tried if it may be.

    registry: the module of the kind, such as pyrite.losses; parts of another registry are guarded, and promise nothing.
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
    """The function with its data protected and its answers read."""

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
    """Data as it is lent: lists, and tensors that keep no count of changes, as copies."""
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
    """N numbers, whatever holds them: a tensor, a list, an array. Nothing is lost: large whole numbers stay exact."""
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


def _maker(own: Own, answer: Any, data: tuple[Any, ...]) -> Any:
    missing = [name for name in ("scores", "learn", "learners") if not hasattr(answer, name)]
    if missing:
        raise own.fault(f"makes {_called(answer)} without {' and '.join(missing)}; see pyrite.discriminators")
    return Discriminating(own, answer)


@dataclass(frozen=True)
class Discriminating:
    """A discriminator of the user's own, its answers checked."""

    own: Own
    inner: Any

    @property
    def learners(self) -> Sequence[Any]:
        """Of its members, for checkpoints."""
        return self.inner.learners

    def scores(self, answers: Sequence[Any]) -> Tensor:
        """(E, N), finite."""
        with self.own.running():
            found = self.inner.scores(list(answers))
        if not (isinstance(found, Tensor) and found.ndim == 2 and found.shape[1] == len(answers)):
            shape = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else _called(found)
            raise self.own.fault(f"scores() returns {shape}; return a tensor (E, N), N = {len(answers)} answers")
        if not found.isfinite().all():
            raise self.own.fault("scores() returns a value that is not finite")
        return found.detach()

    def learn(self, labels: Sequence[Any], *, seed: int) -> dict[str, float]:
        """Means over its updates, by name."""
        with self.own.running():
            found = self.inner.learn(list(labels), seed=seed)
        if not isinstance(found, Mapping):
            raise self.own.fault(f"learn() returns {_called(found)}; return numbers by name, such as {{'loss': 0.5}}")
        return dict(found)


def _called(value: Any) -> str:
    """How a value is called in a message."""
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


# Trials -------------------------------------------------------------------------------------------------------------


def _pairs() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (toy_pairs(learning=True),), {}


def _scored() -> tuple[tuple[Any, ...], dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(6, generator=g).requires_grad_() for _ in range(2)), {}


def _members() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(3, 6, generator=torch.Generator().manual_seed(0)),), {}


def _margins() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _members()[0], {"generator": torch.Generator().manual_seed(0)}


PAIR = "return one value a pair, shape (B,)"
CONTRACTS = {
    "losses": Contract(("pair",), PAIR, _loss, _pairs),
    "reward_losses": Contract(("chosen", "rejected"), PAIR, _loss, _scored),
    "ensembles": Contract(("scores",), "one score an answer, shape (N,)", _score_a_column, _members),
    "selectors": Contract(
        ("margins",), "one priority a pair, shape (B,)", _score_a_column, _margins, late=("generator",)
    ),
    "golds": Contract(("prompts", "responses"), "one score a response", _score_a_row),
    "judges": Contract(("prompts", "a", "b"), "P(a beats b) of each pair", _score_a_row),
    "samplers": Contract(instance="Sampler"),
    "schedules": Contract(instance="Schedule"),
    "discriminators": Contract(("players", "seed"), "a discriminator", _maker),
}


# Surroundings -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def undisturbed(state: dict[str, Any], name: str) -> Iterator[None]:
    """Run code that may do anything to its surroundings, with random numbers of its own, kept in `state`."""
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


def _frames(error: BaseException | None) -> list[Any]:
    return list(traceback.walk_tb(error.__traceback__)) if error else []


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = numpy.random.get_state()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state:
        sys.modules["numpy"].random.set_state(state["numpy"])


def _seeded(seed: int) -> dict[str, Any]:
    """The random numbers that a part begins with."""
    state: dict[str, Any] = {"python": random.Random(seed).getstate()}
    state["torch"] = torch.Generator().manual_seed(seed % 2**63).get_state()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = numpy.random.RandomState(seed % 2**32).get_state()
    return state
