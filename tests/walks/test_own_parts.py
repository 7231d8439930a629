"""Parts of the user's own, honest and not: what is wrong is one line with file and line, before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pyrite import cli
from pyrite.cli import commands
from pyrite.core import specs
from pyrite.data import rows as data
from pyrite.feedback import judges, schedules, scorers, selection
from pyrite.math import ensembles, losses, reward_losses, samplers
from pyrite.math.losses.needs import needs
from pyrite.training import live_rewards

Command = Callable[..., tuple[int, str, str]]
HEAD = "import torch\nimport torch.nn.functional as F\n\n\n"  # a part begins in line 5
MY_DPO = """def my_dpo(pair, *, beta: float = 0.1):
    margin = (pair.chosen.sum - pair.ref_chosen.sum) - (pair.rejected.sum - pair.ref_rejected.sum)
    return -F.logsigmoid(beta * margin)
"""


@pytest.fixture
def pyrite(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Exit status, standard output and standard error of a command."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["pyrite", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.chdir(tmp_path)

    def write(code: str) -> None:
        (tmp_path / "mine.py").write_text(HEAD + code)

    return write


# Losses -------------------------------------------------------------------------------------------------------------


def test_three_lines_of_dpo_train_as_dpo_does(
    pyrite: Command, mine: Callable, tiny: Path, pairs: Path, tmp_path: Path
) -> None:
    mine(MY_DPO)
    common = ("dpo", "--model", tiny, "--data", pairs, "--batch-size", 10, "--lr", 1e-3, "--logging-steps", 1)
    for out, loss in (("own", "mine.py:my_dpo(beta=0.1)"), ("shipped", "dpo(beta=0.1)")):
        status, _, err = pyrite(*common, "--out", out, "--loss", loss)
        assert status == 0, err
    for name in ("model/model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "shipped" / name).read_bytes(), name
    rows = [json.loads(line) for line in (tmp_path / "own" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) > 3


@pytest.mark.parametrize(
    ("code", "needed"),
    [
        ("def f(pair): return -F.logsigmoid(pair.chosen.sum - pair.rejected.sum)", set()),
        ("def f(pair): return -F.logsigmoid(pair.strength * (pair.chosen.sum - pair.rejected.sum))", {"strength"}),
        ("def f(pair): return -pair.chosen.tokens.sum(1) + pair.rejected.sum", {"tokens"}),
        ("def f(pair): return pair.chosen.kl - pair.chosen.sum", {"kl"}),
        ("def f(pair): return pair.chosen.sum - pair.running.margin", {"running"}),
        ("def f(pair): return pair.chosen.sum - pair.chosen.sum.mean()", {"batch"}),
    ],
)
def test_what_a_natural_loss_needs_is_found(mine: Callable, code: str, needed: set[str]) -> None:
    mine(code + "\n")
    found = needs(specs.part("mine.py:f", losses))
    assert needed <= found
    assert ("ref" in found) == ("ref" in needed)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "def f(pair): return (pair.chosen.sum - pair.rejected.sum).mean()",
            "mine.py:5, f(): returns one number for the whole batch; return one value a pair, shape (B,)",
        ),
        (
            "def f(pair): return (pair.chosen.sum - pair.rejected.sum)[:, None]",
            "mine.py:5, f(): returns shape (6, 1) for 6 pairs",
        ),
        ("def f(pair): return pair.chosen.sum * float('nan')", "mine.py:5, f(): returns nan"),
        ("def f(pair): return pair.chosen.sum / 0", "mine.py:5, f(): returns -inf"),
        ("def f(pair): return None", "mine.py:5, f(): returns None"),
        ("def f(pair):\n    pair.chosen.sum", "mine.py:5, f(): returns None"),
        ("def f(pair): return 'loss'", "returns text ('loss')"),
        ("def f(pair): return 0.5", "returns one number (0.5)"),
        ("def f(pair): yield pair.chosen.sum", "returns a generator"),
        ("async def f(pair): return pair.chosen.sum", "returns a coroutine"),
        ("def f(pair): return pair.chosen.length", "has no gradient"),
        ("def f(pair): return pair.chosen.sum.detach()", "without a gradient"),
        ("def f(pair):\n    torch.set_grad_enabled(False)\n    return pair.chosen.sum * 2", "without a gradient"),
        ("@torch.no_grad()\ndef f(pair): return pair.chosen.sum * 2", "without a gradient"),
        ("def f(pair):\n    x = 1\n    return pair.chosen.sum / (x - 1) + [1] / 2", "mine.py:7, f(): TypeError: "),
        ("def f(pair):\n    return pair.chosen.summ", "mine.py:6, f(): AttributeError: "),
        (
            "def f(pair):\n    return g(pair)\n\n\ndef g(pair):\n    return 1 / 0",
            "mine.py:10, f(): ZeroDivisionError: division by zero",
        ),
        ("def f(pair):\n    raise KeyError", "mine.py:6, f(): KeyError"),
        ("def f(pair):\n    import sys\n    sys.exit(3)", "mine.py:7, f(): SystemExit: 3"),
        (
            "def f(pair):\n    return pair.chosen.sum + torch.zeros(4)",
            "mine.py:6, f(): RuntimeError: ",
        ),
        (
            "def f(pair):\n    pair.rejected.mask.zero_()\n    return pair.chosen.sum",
            "changes what it is given in place",
        ),
        (
            "def f(): return None",
            "so it must return the function to call with (pair); it returns None",
        ),
        ("def f(pair, other): return pair", "missing a required argument: 'other'"),
        ("def f(pair, *, tau): return pair.chosen.sum * tau", "missing a required argument: 'tau'"),
        ("class f:\n    pass", "f is a class; write a function"),
        ("import functools\nf = functools.partial(print)", "f is not a function of this file"),
        ("def g(pair): return 1", "unknown name 'f' in mine.py"),
        ("raise OSError('no such thing')", "cannot import mine.py: OSError: no such thing (mine.py, line 5)"),
        ("import sys\nsys.exit('enough')", "cannot import mine.py: SystemExit: enough (mine.py, line 6)"),
        ("import not_there", "no module named 'not_there' (mine.py, line 5)"),
        ("def f(pair)\n    return 1", "cannot import mine.py: SyntaxError: expected ':' (mine.py, line 5)"),
    ],
)
def test_a_loss_that_misbehaves_is_one_line_before_a_model_is_loaded(
    pyrite: Command, mine: Callable, pairs: Path, tmp_path: Path, code: str, words: str
) -> None:
    mine(code + "\n")
    before = sorted(tmp_path.rglob("*.*"))
    status, out, err = pyrite("dpo", "--model", "not/there", "--data", pairs, "--out", "run", "--loss", "mine.py:f")
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert "not/there" not in err
    assert [path for path in sorted(tmp_path.rglob("*.*")) if "__pycache__" not in path.parts] == before


def test_options_by_position_are_told_how_to_be_options(mine: Callable) -> None:
    mine("def f(pair, beta=0.1): return beta * pair.chosen.sum\n\n\ndef g(pair, **more): return pair.chosen.sum\n")
    with pytest.raises(ValueError, match=r"put a star before its options: def f\(\.\.\., \*, beta=\.\.\.\)"):
        specs.part("mine.py:f(beta=0.2)", losses)
    assert specs.part("mine.py:f", losses)
    with pytest.raises(ValueError, match="g has no option 'beta'"):
        specs.part("mine.py:g(beta=0.2)", losses)


def test_a_range_of_ones_own_is_checked(mine: Callable) -> None:
    mine(
        "from pyrite.math.ranges import Positive\n\n\n"
        "def f(pair, *, beta: Positive = 0.1): return beta * pair.chosen.sum\n"
    )
    with pytest.raises(ValueError, match="f: option beta=-1: give a number above 0"):
        specs.part("mine.py:f(beta=-1)", losses)


def test_honest_losses_of_every_form(mine: Callable) -> None:
    mine(
        MY_DPO
        + "\n\nshort = lambda pair: -F.logsigmoid(pair.chosen.sum - pair.rejected.sum)\n"
        + "\n\ndef made(*, beta=0.1):\n    return lambda pair: my_dpo(pair, beta=beta)\n"
        + "\n\ndef listed(pair):\n    return [a - b for a, b in zip(pair.chosen.sum, pair.rejected.sum)]\n"
        + "\n\ndef double(pair):\n    return my_dpo(pair).double()\n"
    )
    for spec in ("my_dpo", "short", "made(beta=0.2)", "listed", "double"):
        assert specs.part(f"mine.py:{spec}", losses)


# Surroundings -------------------------------------------------------------------------------------------------------


def test_nothing_a_part_does_to_its_surroundings_lasts(
    mine: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine(
        "import os, random\n"
        "print('imported')\ntorch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\n"
        "keep = []\n\n\ndef score(prompts, responses):\n    print('asked')\n    torch.manual_seed(0)\n"
        "    random.seed(0)\n"
        "    torch.set_default_dtype(torch.float64)\n    torch.set_grad_enabled(False)\n"
        "    keep.append(torch.inference_mode())\n    keep[-1].__enter__()\n    os.chdir('/')\n"
        "    responses.clear()\n    return [1.0] * len(prompts)\n"
    )
    import random

    scorer = specs.part("mine.py:score", scorers)
    torch.manual_seed(5)
    random.seed(5)
    want = torch.rand(3), random.random()
    torch.manual_seed(5)
    random.seed(5)
    responses = ["a", "b"]
    assert scorer(["p", "q"], responses).tolist() == [1.0, 1.0]
    assert torch.equal(torch.rand(3), want[0]) and random.random() == want[1]
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert Path.cwd() == tmp_path
    assert responses == ["a", "b"]
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "imported\nasked\n"


def test_a_part_draws_on_from_call_to_call(mine: Callable) -> None:
    mine("def score(prompts, responses): return torch.rand(len(prompts))\n")
    scorer = specs.part("mine.py:score", scorers)
    first, second = scorer(["p"], ["a"]), scorer(["p"], ["a"])
    assert first.item() != second.item()
    assert specs.part("mine.py:score", scorers)(["p"], ["a"]).item() == first.item()


# Golds and judges ---------------------------------------------------------------------------------------------------

SCORES = [
    ("return [1, 2]", [1.0, 2.0]),
    ("return (1.5, 2)", [1.5, 2.0]),
    ("return torch.tensor([1, 2])", [1.0, 2.0]),
    ("return torch.tensor([1.0, 2.0], requires_grad=True)", [1.0, 2.0]),
    ("import numpy\n    return numpy.array([1, 2])", [1.0, 2.0]),
    ("import numpy\n    return [numpy.float32(1), numpy.int64(2)]", [1.0, 2.0]),
    ("return [torch.tensor(1.0), torch.tensor(2.0)]", [1.0, 2.0]),
    ("return [True, False]", [1.0, 0.0]),
    ("return [2**24 + 1, 0]", [2.0**24 + 1, 0.0]),
    ("return (len(y) for y in responses)", None),
    ("return [float(len(y)) for y in responses]", [1.0, 2.0]),
]


@pytest.mark.parametrize(("body", "want"), SCORES)
def test_what_converts_without_loss_is_taken(mine: Callable, body: str, want: list[float] | None) -> None:
    mine(f"def score(prompts, responses):\n    {body}\n")
    scorer = specs.part("mine.py:score", scorers)
    if want is None:
        with pytest.raises(ValueError, match="returns a generator"):
            scorer(["p", "q"], ["a", "bb"])
        return
    found = scorer(["p", "q"], ["a", "bb"])
    assert found.tolist() == want
    assert found.is_floating_point() and not found.requires_grad


BAD_SCORES = [
    ("return None", "mine.py:5, score(): returns None; return one number for each"),
    ("pass", "returns None"),
    ("return 1.0", "returns one number (1.0)"),
    ("return torch.tensor(1.0)", "returns one number for"),
    ("return [1.0]", "returns 1 values for"),
    ("return [[1.0]] * len(prompts)", "returns a list at place 1"),
    ("return torch.ones(len(prompts), 1)", "returns shape ("),
    ("return ['a'] * len(prompts)", "returns text ('a') at place 1"),
    ("return [None] * len(prompts)", "returns None at place 1"),
    ("return 'good'", "returns text ('good')"),
    ("return {'score': 1.0}", "returns a dict"),
    ("return torch.ones(len(prompts), dtype=torch.complex64)", "complex"),
    ("return [1 / 0]", "mine.py:6, score(): ZeroDivisionError: division by zero"),
    ("import sys\n    sys.exit()", "mine.py:7, score(): SystemExit"),
    ("return [float('nan')] * len(prompts)", "scores must be finite"),
    ("return [float('inf')] * len(prompts)", "scores must be finite"),
]


@pytest.fixture
def candidates(tmp_path: Path) -> Path:
    row = {"prompt_id": "0", "prompt": "tell me", "finished": True, "length": 2, "logp": -1.0}
    rows = [
        {**row, "prompt_id": str(p), "prompt": f"tell {p}", "sample": s, "response": "a " * (s + p + 1)}
        for p in range(3)
        for s in range(2)
    ]
    data.write(rows, tmp_path / "candidates.jsonl")
    return tmp_path / "candidates.jsonl"


@pytest.mark.parametrize(("body", "words"), BAD_SCORES)
def test_a_gold_that_misbehaves(
    pyrite: Command, mine: Callable, candidates: Path, tmp_path: Path, body: str, words: str
) -> None:
    mine(f"def score(prompts, responses):\n    {body}\n")
    status, out, err = pyrite("label", "--candidates", candidates, "--gold", "mine.py:score", "--out", "run")
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert words in err
    assert not (tmp_path / "run").exists()


BAD_VERDICTS = [
    ("return None", "mine.py:5, better(): returns None"),
    ("return 0.5", "returns one number (0.5)"),
    ("return ['a'] * len(a)", "returns text ('a') at place 1"),
    ("return [2.0] * len(a)", "P(a beats b) lies in [0, 1]"),
    ("return [0.5]", "returns 1 values for"),
    ("raise ValueError('no idea')", "mine.py:6, better(): ValueError: no idea"),
]


@pytest.mark.parametrize(("body", "words"), BAD_VERDICTS)
def test_a_judge_that_misbehaves(pyrite: Command, mine: Callable, candidates: Path, body: str, words: str) -> None:
    mine(f"def better(prompts, a, b):\n    {body}\n")
    status, _, err = pyrite("label", "--candidates", candidates, "--judge", "mine.py:better", "--out", "run")
    assert status == 2
    assert words in err


def test_honest_golds_and_judges(pyrite: Command, mine: Callable, candidates: Path, tmp_path: Path) -> None:
    mine(
        "def score(prompts, responses):\n    print('asked')\n    return [len(y) for y in responses]\n\n\n"
        "def made(*, unit='chars'):\n    return score\n\n\n"
        "def better(prompts, a, b):\n    return [float(len(x) > len(y)) for x, y in zip(a, b)]\n"
    )
    for number, option in enumerate(
        (("--gold", "mine.py:score"), ("--gold", "mine.py:made(unit='x')"), ("--judge", "mine.py:better"))
    ):
        status, out, err = pyrite("label", "--candidates", candidates, *option, "--out", f"run{number}")
        assert status == 0, err
        assert "asked" not in out
        assert len(data.load(str(tmp_path / f"run{number}" / "candidates.parquet"), "candidates")) == 6


def test_a_gold_is_called_for_no_trial_of_its_own(mine: Callable, tmp_path: Path) -> None:
    """It may cost money."""
    mine(
        "def score(prompts, responses):\n    open('called', 'a').write('x')\n    return [1.0] * len(prompts)\n\n\n"
        "def better(prompts, a, b):\n    return score(prompts, a)\n"
    )
    specs.part("mine.py:score", scorers)
    specs.part("mine.py:better", judges)
    assert not (tmp_path / "called").exists()


# The other kinds ----------------------------------------------------------------------------------------------------

HONEST = [
    (reward_losses, "def f(chosen, rejected, *, scale=1.0): return -F.logsigmoid(scale * (chosen - rejected))"),
    (ensembles, "def f(scores, *, k=1): return scores.topk(k, 0, largest=False).values.mean(0)"),
    (ensembles, "def f(scores): return scores.mean(0).tolist()"),
    (selection, "def f(margins, generator=None): return -margins.mean(0).abs()"),
    (selection, "def f(margins, generator): return torch.rand(margins.shape[1], generator=generator)"),
    (samplers, "from pyrite.math.samplers import on_policy\n\n\ndef f(): return on_policy()"),
    (schedules, "from pyrite.feedback.schedules import even\n\n\ndef f(*, window=2): return even(window=window)"),
    (live_rewards, "def f(*, scale=1.0):\n    return lambda players, seed: None"),
]
BAD = [
    (reward_losses, "def f(chosen, rejected): return (chosen - rejected).mean()", "one number for the whole batch"),
    (reward_losses, "def f(chosen): return chosen", "called with (chosen, rejected)"),
    (ensembles, "def f(scores): return scores.mean()", "returns one number for 6"),
    (ensembles, "def f(scores): return scores.mean(1)", "returns 3 values for 6"),
    (ensembles, "def f(scores): return scores.mean(0) / 0", "inf"),
    (ensembles, "def f(scores):\n    scores -= 1\n    return scores.mean(0)", "changes what it is given in place"),
    (ensembles, "def f(scores): return 'best'", "returns text"),
    (selection, "def f(margins, generator=None): return margins", "returns shape (3, 6) for 6"),
    (selection, "def f(margins): return -margins.mean(0)", "unexpected keyword argument 'generator'"),
    (samplers, "def f(): return None", "returns None; return a pyrite.math.samplers.Sampler"),
    (samplers, "def f(policy, ref): return policy", "it must take options only, after a star"),
    (samplers, "def f(): return 1 / 0", "mine.py:5, f(): ZeroDivisionError"),
    (schedules, "def f(): return 3", "return a pyrite.feedback.schedules.Schedule"),
    (live_rewards, "def f(): return 3", "it returns one number (3)"),
    (live_rewards, "def f(): return lambda players: 3", "called with (players, seed)"),
]


@pytest.mark.parametrize(("registry", "code"), HONEST)
def test_honest_parts_of_every_kind(mine: Callable, registry, code: str) -> None:
    mine(code + "\n")
    assert specs.part("mine.py:f", registry)


@pytest.mark.parametrize(("registry", "code", "words"), BAD)
def test_parts_that_misbehave_are_refused_when_named(mine: Callable, registry, code: str, words: str) -> None:
    mine(code + "\n")
    with pytest.raises(ValueError) as error:
        specs.part("mine.py:f", registry)
    assert words in str(error.value)
    assert str(error.value).startswith("mine.py:")


def test_a_discriminator_is_checked_as_it_works(mine: Callable) -> None:
    mine(
        "class Mine:\n    learners = ()\n    def scores(self, answers): return torch.zeros(len(answers))\n"
        "    def learn(self, labels, *, seed): return None\n\n\n"
        "def f(): return lambda players, seed: Mine()\n\n\ndef g(): return lambda players, seed: object()\n"
    )
    made = specs.part("mine.py:f", live_rewards)(None, 0)
    with pytest.raises(ValueError, match=r"scores\(\) returns shape \(2,\); return a tensor \(E, N\), N = 2 answers"):
        made.scores(["a", "b"])
    with pytest.raises(ValueError, match=r"learn\(\) returns None"):
        made.learn([], seed=0)
    with pytest.raises(ValueError, match="without scores and learn and learners"):
        specs.part("mine.py:g", live_rewards)(None, 0)


def test_a_bandit_races_an_own_loss_and_an_own_sampler(pyrite: Command, mine: Callable) -> None:
    mine(MY_DPO + "\n\nfrom pyrite.math.samplers import uniform\n\n\ndef even(): return uniform()\n")
    options = ("--actions", 4, "--instances", 3, "--seeds", 2, "--steps", 5, "--loss", "mine.py:my_dpo")
    status, _, err = pyrite(
        "bandit", "--out", "own", "--samplers", "mine.py:even", "--loss", "mine.py:my_dpo", *options
    )
    assert status == 0, err


def test_the_contract_of_every_kind_is_written_down() -> None:
    assert specs.__doc__
    assert all(f"\n    {kind} " in specs.__doc__ for kind in specs.CONTRACTS)
    kinds = {module.rpartition(".")[2] for kind, module in cli.KINDS.items() if kind not in ("jobs", "recipes")}
    assert set(specs.CONTRACTS) == kinds


# Errors of others ---------------------------------------------------------------------------------------------------


def test_an_error_of_a_library_says_whose_it_is(
    pyrite: Command, monkeypatch: pytest.MonkeyPatch, tiny: Path, demos: Path, tmp_path: Path
) -> None:
    def broken(_: object) -> None:
        json.loads("{")

    monkeypatch.setattr(commands, "_command", broken)
    status, out, err = pyrite("sft")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "Expecting property name" in err
    assert "(in json at decoder.py:" in err and "--debug" in err


def test_pyrites_own_words_stay_as_they_are(pyrite: Command) -> None:
    status, _, err = pyrite("sfd")
    assert status == 2
    assert "--debug" not in err and ".py:" not in err


@pytest.mark.parametrize(
    ("body", "words"),
    [("return None", "mine.py:5, f(): returns None"), ("return [1 / 0]", "mine.py:6, f(): ZeroDivisionError")],
)
def test_rewards_and_judges_of_rounds_are_tried_before_they_begin(
    pyrite: Command, mine: Callable, tiny: Path, tmp_path: Path, body: str, words: str
) -> None:
    data.write([{"prompt_id": str(i), "prompt": f"tell me {i}"} for i in range(8)], tmp_path / "prompts.jsonl")
    mine(f"def f(*texts):\n    {body}\n")
    common = ("--model", tiny, "--prompts", "prompts.jsonl", "--out", "run", "--max-new-tokens", 4)
    for job, option in (("ppo", "--reward"), ("online", "--judge")):
        status, out, err = pyrite(job, *common, option, "mine.py:f()")
        assert (status, out) == (2, ""), err
        assert words in err.splitlines()[-1]
        assert not (tmp_path / "run").exists()


def test_a_loss_that_could_do_without_a_reference_gets_one() -> None:
    """What is typed as optional invites a guard; a loss that has one is still DPO where there is a reference."""

    def guarded(pair):
        chosen = pair.ref_chosen.sum if pair.ref_chosen is not None else 0.0
        rejected = pair.ref_rejected.sum if pair.ref_rejected is not None else 0.0
        return -torch.nn.functional.logsigmoid((pair.chosen.sum - chosen) - (pair.rejected.sum - rejected))

    assert needs(guarded) == {"ref"}
