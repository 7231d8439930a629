"""The public names: documented, typed, loaded without torch; the lines a notebook starts with run as they stand."""

from __future__ import annotations

import functools
import inspect
import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import pyrite
from pyrite.core.specs import given

NAMES = [name for name in pyrite.__all__ if name != "__version__"]
JOBS = ("sft", "generate", "label", "reward", "dpo", "online", "ppo", "evaluate")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects that jobs are given lie in the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_about_25_names() -> None:
    assert 20 <= len(NAMES) <= 30
    assert set(NAMES) <= set(dir(pyrite))


@pytest.mark.parametrize("name", NAMES)
def test_each_is_documented_and_typed(name: str) -> None:
    thing = getattr(pyrite, name)
    assert inspect.getdoc(thing)
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(one.annotation is not inspect.Parameter.empty for one in signature.parameters.values())


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Polcy'; did you mean 'Policy'"):
        pyrite.Polcy  # noqa: B018


def test_importing_loads_no_torch() -> None:
    code = "import sys, pyrite; assert pyrite.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_first_lines_of_a_notebook(tiny: Path, demos: Path, pairs: Path, tmp_path: Path) -> None:
    rewards_run = pyrite.reward(str(tiny), str(pairs), members=2, epochs=1, out=tmp_path / "reward")
    prompts = [row["prompt"] for row in pyrite.load(demos, "prompts")]

    policy = pyrite.Policy.load(tiny, dtype="float32")
    base = pyrite.Policy.load(tiny)
    rewards = pyrite.RewardEnsemble.load(rewards_run.folder)
    gold = pyrite.scorer("length()")
    answers = policy.sample(prompts, k=16, seed=0, max_new_tokens=20)
    curve = pyrite.best_of_n(rewards.score(answers), gold(answers), n=[1, 4, 16])
    found = pyrite.evaluate(policy, prompts, gold=gold, proxy=rewards, ref=base, max_new_tokens=20)
    run = pyrite.dpo(policy, pyrite.load(pairs, "pairs"), loss=pyrite.losses.simpo(beta=2.0), out=tmp_path / "dpo")

    assert len(answers) == 16 * len(prompts) and curve.shape == (3, len(prompts))
    assert {"gold", "proxy", "kl_k1"} <= found.results.keys() | set(found.results.get("means", {}))
    assert json.loads((run.folder / "config.json").read_text())["loss"].startswith("given:simpo")
    assert (run.folder / "model" / "model.safetensors").exists()


def test_ten_lines_of_an_own_training_loop(tiny: Path, pairs: Path) -> None:
    policy = pyrite.Policy.load(tiny)
    prefs = pyrite.preferences(policy, pyrite.load(pairs, "pairs"), ref=policy)
    optimizer, losses = torch.optim.AdamW(policy.parameters(), lr=1e-2), []
    for batch in prefs.batches(16, epochs=3, seed=0):
        loss = pyrite.losses.dpo(pyrite.pair_logps(policy, batch), beta=0.1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert losses[0] == pytest.approx(0.693147, abs=1e-5) and losses[-1] < 0.6


def test_objects_and_paths_give_equal_runs(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    options = {"epochs": 1, "batch_size": 16, "lr": 1e-3}
    by_path = pyrite.dpo(str(tiny), str(pairs), loss="ipo(tau=0.5)", out=tmp_path / "paths", **options)
    policy, rows = pyrite.Policy.load(tiny), pyrite.load(pairs, "pairs")
    given = pyrite.dpo(policy, rows, loss=pyrite.losses.ipo(tau=0.5), out=tmp_path / "objects", **options)
    assert given.results["last"] == by_path.results["last"]
    again = pyrite.dpo(policy, rows, loss=pyrite.losses.ipo(tau=0.5), out=tmp_path / "objects", **options)
    assert again.done


def test_own_functions_are_held_to_their_contract(tiny: Path, pairs: Path) -> None:
    def mine(pair: pyrite.PairLogps) -> torch.Tensor:
        return pair.chosen.sum.mean()

    with pytest.raises(ValueError, match=r"test_api.py:\d+, mine\(\): returns one number .* one value a pair"):
        pyrite.dpo(str(tiny), str(pairs), loss=mine)


def test_options_that_take_several_take_one(tiny: Path, tmp_path: Path) -> None:
    def cats(prompts: Sequence[str], responses: Sequence[str]) -> list[int]:
        return [response.count("cat") for response in responses]

    prompts = [f"tell me about the {word}" for word in "cat dog bird tree mat".split()]
    options = {"steps": 1, "k": 2, "prompts_per_step": 2, "max_new_tokens": 4, "held_out": 0.2}
    run = pyrite.ppo(str(tiny), prompts, reward=cats, out=tmp_path / "ppo", **options)
    assert run.done and len(run.config["reward"]) == 1


def test_a_prompt_may_be_a_conversation(tiny: Path, tmp_path: Path) -> None:
    prompts = [[{"role": "user", "content": f"tell me about the {word}"}] for word in ("cat", "dog")]
    run = pyrite.generate(str(tiny), prompts, k=1, max_new_tokens=2, out=tmp_path / "answers")
    assert [row["prompt"] for row in pyrite.load(run.folder / "candidates.parquet", "candidates")] == prompts


def test_a_wrong_option_is_refused_with_the_nearest(tiny: Path, pairs: Path) -> None:
    with pytest.raises(TypeError, match=r"dpo\(\) has no option 'learning_rates'"):
        pyrite.dpo(str(tiny), str(pairs), learning_rates=1e-3)
    with pytest.raises(TypeError, match="did you mean 'batch_size'"):
        pyrite.dpo(str(tiny), str(pairs), batchsize=8)


@pytest.mark.parametrize("nothing", [None, 3])
def test_a_scorer_is_a_spec_or_a_function(nothing: object) -> None:
    with pytest.raises(ValueError, match="a spec string or a function"):
        pyrite.scorer(nothing)  # pyright: ignore[reportArgumentType]


def test_a_scorer_of_ones_own(tiny: Path) -> None:
    def cats(prompts: Sequence[str], responses: Sequence[str]) -> list[int]:
        return [response.count("cat") for response in responses]

    answers = pyrite.Policy.load(tiny).sample(["tell me about the cat"], k=3, max_new_tokens=8)
    assert pyrite.scorer(cats)(answers)[0].tolist() == [text.count("cat") for text in answers.texts]


def test_a_given_function_has_the_same_name_in_every_process() -> None:
    code = "import pyrite; from pyrite.core.specs import given; print(given(pyrite.losses.simpo(beta=2.0)))"
    found = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "ab"
    }
    assert len(found) == 1


NOTEBOOK = """
import pyrite, torch
from dataclasses import dataclass
from pyrite.core.specs import given
class Words:
    def __init__(self, some): self.some, self.weights = some, torch.arange(3) + len(some)
    def __call__(self, prompts, responses): return [len(self.some & set(one.split())) for one in responses]
def made(some, scale=1.0):
    words = Words(some)
    def count(prompts, responses, words=words):
        return [scale * n for n in words(prompts, responses)]
    return count
def typed(prompts, responses): return [{first!r} in one for one in responses]
print(given(typed), given(made({{{first!r}, "dog", "bird"}})))
print(given(made({{"cat", "dog"}}, 2.0)), given(Words({{{first!r}}})))
"""


def names_of_given_functions(first: str) -> list[str]:
    code = NOTEBOOK.format(first=first)
    done = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_what_a_function_holds_is_in_its_name() -> None:
    """Objects count by their content, the same in every process, not by their place in memory."""
    first, again, other = map(names_of_given_functions, ("cat", "cat", "cow"))
    assert first == again
    assert [one == two for one, two in zip(first, other, strict=True)] == [False, False, True, False]
    assert len(set(first)) == 4


def test_two_lambdas_of_one_line_have_two_names() -> None:
    both = lambda pair: -pair.chosen.sum, lambda pair: -2 * pair.chosen.sum
    assert len({given(one) for one in both}) == 2


@functools.cache
def weight(text: str) -> float:
    return 1.0 + len(text)


def test_a_function_that_holds_a_cached_one_is_named_by_its_code() -> None:
    def weighs(word: str, scale: float, weight: Callable[[str], float] = weight) -> Callable:
        @functools.lru_cache(maxsize=4)
        def points(text: str) -> float:
            return scale * text.count(word) * weight(text)

        return lambda prompts, responses: [points(response) for response in responses]

    first, again, scaled = weighs("cat", 1.0), weighs("cat", 1.0), weighs("cat", 2.0)
    other = weighs("cat", 1.0, functools.cache(lambda text: 2.0 + len(text)))
    first([""], ["a cat"])  # what it remembers is not in its name
    assert given(first) == given(again)
    assert len({given(first), given(scaled), given(other)}) == 3


def test_a_function_that_holds_what_has_no_name_is_refused(tiny: Path, pairs: Path) -> None:
    lock = threading.Lock()

    def locked(pair: pyrite.PairLogps) -> torch.Tensor:
        with lock:
            return -pair.chosen.sum

    with pytest.raises(ValueError, match=r"locked\(\) holds something .*cannot pickle '_thread.lock'.*mine.py:name"):
        pyrite.dpo(str(tiny), str(pairs), loss=locked)


class DataFrame:
    """One of pandas, which is no dependency."""


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (lambda: pyrite.Run(Path("runs/sft"), {}, {}), "dpo: data is a Run: give a path in its folder"),
        (lambda: pyrite.Responses.of([([1], [[2]])]), "dpo: data is a Responses: give rows, a list of dictionaries"),
        (DataFrame, r"dpo: data is a DataFrame: give its rows, frame.to_dict\('records'\)"),
        (lambda: [3], "dpo: data holds 3: give prompts, or rows as dictionaries"),
        (lambda: [[3]], r"dpo: data holds \[3\]: give prompts, or rows as dictionaries"),
        (object, "dpo: data is a object: give a model, rows, a function or a path"),
    ],
    ids=["run", "responses", "frame", "numbers", "lists", "object"],
)
def test_an_object_that_no_job_takes_is_refused_with_what_to_give(
    thing: Callable[[], object], words: str, tiny: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        pyrite.dpo(str(tiny), thing())


def test_a_file_of_no_kind_is_refused(pairs: Path) -> None:
    with pytest.raises(ValueError, match=r"say which kind of rows .*load\(path, 'pairs'\): prompts, demos"):
        pyrite.load(pairs)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([1, 2], "prompt 0 is 1: give a text, or a list of messages"),
        ([[1, 2]], r"prompt 0 is \[1, 2\]: give a text"),
        ([{"prompt": "hi"}], r"give row\['prompt'\]"),
        ("hi", "prompts is one text: give a list of prompts"),
    ],
)
def test_what_is_no_prompt_is_refused(prompts: Sequence, words: str, tiny: Path) -> None:
    with pytest.raises(ValueError, match=words):
        pyrite.Policy.load(tiny).sample(prompts)


def test_a_precision_by_another_name_is_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match="dtype 'bf16': give 'float32' or 'bfloat16'"):
        pyrite.Policy.load(tiny, dtype="bf16")  # pyright: ignore[reportArgumentType]


BETA = 0.1


def scaled(prompts: list[str], responses: list[str]) -> list[float]:
    return [BETA * len(said) for said in responses]


def test_a_function_is_named_by_the_globals_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    first = given(scaled)
    assert given(scaled) == first
    monkeypatch.setitem(globals(), "BETA", 0.5)
    assert given(scaled) != first


def test_what_is_no_list_of_prompts_or_texts_is_refused(tiny: Path) -> None:
    policy = pyrite.Policy.load(tiny)
    for wrong in ({"prompt": "a"}, None, {"a", "b"}):
        with pytest.raises(ValueError, match="give a list of texts or of conversations"):
            policy.sample(wrong)  # type: ignore[arg-type]
    gold = pyrite.scorer("length()")
    for bad in ((None,), ("a", "b"), (["a"], None)):
        with pytest.raises(ValueError, match="two lists of texts, prompts and responses"):
            gold(*bad)
    with pytest.raises(ValueError, match="finite"):
        pyrite.scorer(lambda prompts, responses: [math.nan, math.nan])(["a", "b"], ["b", "c"])
