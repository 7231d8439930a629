"""Policy optimization: it starts at the reference, follows its reward, prices KL, resumes exactly."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import launch
import pytest
import torch
from families import Row

from pyrite.core.runs import read_json, read_metrics
from pyrite.data.conditioning import Variants
from pyrite.data.responses import Responses
from pyrite.jobs import ppo
from pyrite.models.policy import HEAD, Policy, RewardModel, ValueModel
from pyrite.training.evaluation import Evaluation
from pyrite.training.loop import Training, TrainingError
from pyrite.training.ppo import Rollouts

TRAINING = Training(lr=3e-3, epochs=2, batch_size=8, lr_scheduler_type="cosine(warmup_steps=0)")


@pytest.fixture
def config(tiny: Path, demos: Path, tmp_path: Path) -> ppo.Config:
    return ppo.Config(
        str(tiny),
        str(demos),
        ("length()",),
        tmp_path / "run",
        held_out=0.2,
        steps=3,
        prompts_per_step=12,
        k=2,
        measure_every=2,
        evaluation=Evaluation(gold="length()", max_new_tokens=8),
        training=TRAINING,
    )


def results(config: ppo.Config) -> dict[str, Any]:
    return read_json(ppo.run(config).folder / "done.json")


@pytest.mark.parametrize("method", ["gae", "rloo", "grpo", "reinforce"])
def test_it_follows_its_reward(config: ppo.Config, method: Any) -> None:
    roomy = replace(config.evaluation, max_new_tokens=16)
    found = results(
        replace(config, advantage=f"{method}()", steps=18, k=4, beta=0.0, evaluation=roomy, measure_every=6)
    )
    assert found["last"]["gold"] > found["start"]["gold"] + 3 * found["start"]["gold_se"]
    assert found["last"]["kl_k1"] > 0.1
    assert found["answers"] == 18 * 12 * 4
    assert (config.out / "model" / "model.safetensors").exists()


def test_the_first_step_is_at_the_reference(config: ppo.Config) -> None:
    ppo.run(replace(config, training=replace(TRAINING, epochs=1, batch_size=99)))
    first = read_metrics(config.out)[1]
    assert first["ratio"] == pytest.approx(1, abs=1e-4)
    assert first["clip_fraction"] == 0
    assert first["step_kl"] == pytest.approx(0, abs=1e-6)
    assert first["rollout_kl"] == pytest.approx(0, abs=1e-4)
    assert {"rollout_kl_se", "rollout_kl_k3", "entropy", "cut", "beta", "explained_variance"} <= first.keys()


def test_a_policy_that_is_not_its_reference_is_refused(config: ppo.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ppo.collect

    def other(*given: Any, **options: Any) -> Rollouts:
        made = real(*given, **options)
        return replace(made, ref=replace(made.ref, tokens=made.ref.tokens + 0.1))  # type: ignore[operator]

    monkeypatch.setattr(ppo, "collect", other)
    with pytest.raises(TrainingError, match=r"under the reference is 0\.1"):
        ppo.run(config)


def test_a_price_on_kl_holds_the_policy_back(config: ppo.Config) -> None:
    ends = []
    for beta in (0.0, 2.0):
        found = results(replace(config, steps=10, k=4, beta=beta, out=config.out.with_name(f"beta{beta}")))
        ends.append(found["last"]["kl_k1"])
    assert ends[1] < 0.5 * ends[0]


def test_beta_follows_its_target(config: ppo.Config) -> None:
    far = replace(config, steps=8, beta=0.01, kl="k1(target=0.01, horizon=100)", measure_every=8)
    ppo.run(far)
    betas = [row["beta"] for row in read_metrics(far.out)[1:]]
    assert betas[-1] > betas[0]
    assert all(0.8 <= b / a <= 1.2 for a, b in itertools.pairwise(betas))


@pytest.mark.parametrize("value", ["shared", "detached", "model", "reward"])
def test_every_critic_learns_the_returns(config: ppo.Config, tiny: Path, tmp_path: Path, value: str) -> None:
    RewardModel.load(tiny, head_seed=0).save(tmp_path / "reward")
    (tmp_path / "three.py").write_text("import torch\ndef score(p, r):\n    return torch.full((len(r),), 3.0)\n")
    own = value in ("model", "reward")
    path = {"model": tiny, "reward": tmp_path / "reward"}.get(value)
    value = f"model(path={str(path)!r}, lr=3e-3, clip=None)" if own else f"{value}(weight=0.5, clip=None)"
    config = replace(config, reward=(f"{tmp_path}/three.py:score",), value=value)
    ppo.run(replace(config, steps=12, advantage="gae(whiten=False)", beta=0.0))
    rows = read_metrics(config.out)[1:]
    name = "critic_value_loss" if own else "value_loss"
    assert rows[-1][name] < 0.5 * rows[0][name]
    assert ("critic_value_loss" in rows[0]) == own
    if own:
        ValueModel.load(config.out / "value")
    else:
        assert (config.out / "model" / HEAD).exists()
    Policy.load(config.out / "model")


def test_an_ensemble_and_a_scorer_together(config: ppo.Config, tiny: Path, tmp_path: Path) -> None:
    for member in range(2):
        RewardModel.load(tiny, head_seed=member).save(tmp_path / "rewards" / f"member_{member}")
    (tmp_path / "rewards" / "done.json").write_text("{}")
    folder = str(tmp_path / "rewards")
    ppo.run(replace(config, reward=(folder, "0.1*length()"), ensemble="uwo(weight=0.5)"))
    row = read_metrics(config.out)[1]
    assert {f"{folder} mean", f"{folder} variance", f"{folder} member 1", "length() mean"} <= row.keys()
    assert row["score"] == pytest.approx(row[f"{folder} mean"] + 0.1 * row["length() mean"], abs=1e-4)


def test_adapters_alone_are_trained(config: ppo.Config) -> None:
    found = results(replace(config, lora="lora(r=4)"))
    assert found["start"]["kl_k1"] == pytest.approx(0, abs=1e-4)
    assert (config.out / "model" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"value": "own", "reward_scaling": "running()"},
        {"advantage": "reinforce()", "kl": "k1(target=1.0, horizon=100)"},
        {"value": "adapters"},
        {"gold_budget": 8, "gold_limits": "limits(every=2, prompts=3)"},
    ],
)
def test_a_cut_run_goes_on_exactly(
    config: ppo.Config, tiny: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    critics = {"own": str(tiny), "adapters": f"model(path={str(tiny)!r}, lora='lora(r=2)', lr=1e-3)"}
    change = {name: critics.get(value, value) for name, value in change.items()}
    config = replace(config, steps=5, **change)
    whole = ppo.run(replace(config, out=config.out.with_name("whole"))).folder
    real, calls = ppo.Journal.log, []

    def log(self: ppo.Journal, number: int, *rest: Any, **options: Any) -> None:
        calls.append(number)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(self, number, *rest, **options)

    monkeypatch.setattr(ppo.Journal, "log", log)
    with pytest.raises(KeyboardInterrupt):
        ppo.run(config)
    ppo.run(config)
    assert calls == [0, 1, 2, 3, 2, 3, 4]
    assert read_metrics(config.out) == read_metrics(whole)
    ours, theirs = ((folder / "model" / "model.safetensors").read_bytes() for folder in (config.out, whole))
    assert ours == theirs


@pytest.mark.parametrize(
    ("golds", "last", "best"),
    [
        ([0, 1, 3, 1, 1, 9], 4, 2),
        ([3, 1, 1, 9], 2, 0),
        ([0, 1, 2, 3], 6, 6),
        ([0, 3, None, 1, None, 1, 9], 5, 1),  # gold was not asked at steps 2 and 4
    ],
)
def test_it_stops_where_the_proxy_has_parted_from_gold(
    config: ppo.Config,
    rewards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    golds: list[float | None],
    last: int,
    best: int,
) -> None:
    """Measurements as given; the policies, checkpoints and what is kept are real."""
    told = iter(enumerate([*golds, *range(10, 20)]))

    def measure(_: ppo.Journal, step: int, *, over: bool = False) -> dict[str, float]:
        number, gold = next(told)
        known = {} if gold is None else {"gold": float(gold), "gold_se": 0.1}
        return {**known, "proxy": float(number), "kl_k1": float(number), "kl_k1_se": 0.1}

    monkeypatch.setattr(ppo.Journal, "measure", measure)
    watched = replace(config, evaluation=replace(config.evaluation, proxy=str(rewards)))
    found = results(replace(watched, steps=6, measure_every=1, early_stopping_patience=2))
    assert found["last"]["step"] == last
    assert read_json(config.out / "best.json")["step"] == best
    assert ("the proxy has parted from gold at KL" in capsys.readouterr().err) == (last < 6)
    kept, ended = (Policy.load(config.out / name).state_dict() for name in ("best", "model"))
    assert all(torch.equal(kept[name], ended[name]) for name in kept) == (best == last)


def test_adapters_of_a_critic_are_saved_with_it(config: ppo.Config, tiny: Path) -> None:
    ppo.run(replace(config, value=f"model(path={str(tiny)!r}, lora='lora(r=2)', lr=1e-2)"))
    assert (config.out / "value" / "adapter_model.safetensors").exists()
    assert not (config.out / "model" / "adapter_model.safetensors").exists()
    prompt = [Row([1, 20, 21], [[4, 5, 6, 2]])]
    value = ValueModel.load(config.out / "value")
    assert value(value.pack(Responses.of(prompt))).abs().max() > 1e-3  # it began at 0 everywhere
    rows = read_metrics(config.out)[1:]
    assert all(row["critic_value_loss"] > 0 for row in rows)


SCORER = """
import torch
def score(prompts, responses):
    with open({log!r}, "a") as file:
        file.writelines(f"{{p}}|{{y}}\\n" for p, y in zip(prompts, responses))
    return torch.tensor([float(len(y.split())) for y in responses])
"""


def test_gold_is_asked_within_its_budget(
    config: ppo.Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every second measurement, 4 prompts, 9 answers in all; and never twice for one."""
    (tmp_path / "dear.py").write_text(SCORER.format(log=str(tmp_path / "asked.txt")))
    dear = replace(config.evaluation, gold=f"{tmp_path}/dear.py:score()")
    limits = {"gold_budget": 9, "gold_limits": "limits(every=2, prompts=4)"}
    ppo.run(replace(config, evaluation=dear, steps=8, measure_every=1, **limits))
    asked = (tmp_path / "asked.txt").read_text().splitlines()
    assert len(asked) == len(set(asked)) <= 9
    rows = read_metrics(config.out)
    bought = [row["gold_labels"] for row in rows]
    with_gold = [row["step"] for row in rows if "gold" in row]
    assert with_gold[0] == 0 and all(step in (0, 2, 4, 6, 8) for step in with_gold)
    assert bought == sorted(bought) and bought[0] == 4 and bought[-1] == len(asked)
    assert all({"kl_k1", "kl_k3", "length"} <= row.keys() for row in rows)
    assert capsys.readouterr().err.count("measuring goes on without gold") == (with_gold != [0, 2, 4, 6, 8])
    assert len(with_gold) < 5  # the budget did end


def test_an_ample_budget_changes_nothing(config: ppo.Config) -> None:
    config = replace(config, steps=4, measure_every=1)
    free, paid = (replace(config, out=config.out.with_name(name)) for name in ("free", "paid"))
    ends = (
        results(free),
        results(replace(paid, gold_budget=1000, gold_limits="limits(cost=0.5, max_cost=500.0)")),
    )
    rows = read_metrics(paid.out)
    books = [(row.pop("gold_labels"), row.pop("gold_money")) for row in rows]
    assert rows == [pytest.approx(row, abs=1e-6) if "kl_k1" in row else row for row in read_metrics(free.out)]
    assert all(money == labels / 2 for labels, money in books)
    fit = ends[0]["fit"]
    assert ends[1]["fit"] == pytest.approx(fit, abs=1e-6) and {"gold_fit_a", "gold_fit_b"} <= fit.keys()
    assert fit.items() <= read_metrics(free.out)[-1].items()


def test_a_stop_while_gold_is_paid_for_buys_nothing_twice(config: ppo.Config, tmp_path: Path) -> None:
    """Stopped at the 10th question; its answer was not there, so that one is asked again, and no other."""
    files = {"log": str(tmp_path / "asked.txt"), "once": str(tmp_path / "once")}
    (tmp_path / "dear.py").write_text(SCORER.format(**files) + STOP.format(**files))
    dear = replace(config.evaluation, gold=f"{tmp_path}/dear.py:stops()")
    config = replace(
        config, evaluation=dear, gold_budget=100, gold_limits="limits(prompts=3)", steps=5, measure_every=1
    )
    with pytest.raises(KeyboardInterrupt):
        ppo.run(replace(config, out=tmp_path / "cut"))
    ppo.run(replace(config, out=tmp_path / "cut"))
    cut = (tmp_path / "asked.txt").read_text().splitlines()
    assert len(cut) == len(set(cut)) + 1
    ppo.run(replace(config, out=tmp_path / "whole"))
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")


STOP = """
from pathlib import Path
def stops(prompts, responses):
    found = score(prompts, responses)
    if len(Path({log!r}).read_text().splitlines()) == 10 and not Path({once!r}).exists():
        Path({once!r}).touch()
        raise KeyboardInterrupt
    return found
"""


def test_the_end_is_said_with_its_errors(config: ppo.Config, capsys: pytest.CaptureFixture[str]) -> None:
    """A negative k1 as it is: rows of a policy that does not move, so that only chance is left."""
    still = replace(config, training=replace(TRAINING, lr=1e-5), measure_every=1, steps=6)
    found = results(still)
    said = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("ppo: gold"))
    for end in (found["start"], found["last"]):
        assert f"kl_k1 {end['kl_k1']:.3g} ± {end['kl_k1_se']:.2g}" in said or (
            f"-> {end['kl_k1']:.3g} ± {end['kl_k1_se']:.2g}" in said
        )
    assert any(row["kl_k1"] < 0 for row in read_metrics(config.out))


def test_refusals_before_work(config: ppo.Config) -> None:
    for change, words in (
        ({"advantage": "rloo()", "k": 1}, "give --k 2"),
        ({"advantage": "rloo()", "value": "detached()"}, "has no critic"),
        ({"value": "shared(lr=1e-3)"}, "has no option 'lr'"),
        ({"kl": "k2()"}, "unknown name 'k2'"),
        ({"reward_scaling": "running(clip=-1.0)"}, "above 0"),
        ({"evaluation": Evaluation(), "gold_limits": "limits(every=2)"}, "give --gold too"),
        ({"steps": 0}, "at least 1"),
        ({"reward": ()}, "at least one"),
        ({"reward": ("lenght()",)}, "did you mean length"),
        ({"ensemble": "mea()", "reward": (config.model,)}, "mea"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            ppo.run(replace(config, **change))
        assert "\n" not in str(error.value)
    assert not config.out.exists()


def test_weights_of_rewards() -> None:
    assert ppo._weighed("0.5*runs/b") == (0.5, "runs/b")
    assert ppo._weighed("-1e-1 * length()") == (-0.1, "length()")
    assert ppo._weighed("length()") == (1.0, "length()")
    assert torch.tensor(ppo._weighed("2*x:y(z=3*4)")[0]) == 2


def _command(config: ppo.Config, out: Path, **more: str) -> list[str]:
    named = {"--model": config.model, "--prompts": config.prompts, "--reward": "length()", "--out": str(out)}
    options = {"--steps": "4", "--prompts-per-step": "6", "--k": "2", "--max-new-tokens": "8", "--gold": "length()"}
    last = {
        "--lr": "3e-3",
        "--batch-size": "5",
        "--epochs": "2",
        "--lr-scheduler-type": "cosine(warmup_steps=0)",
        "--measure-every": "1",
        **more,
    }
    return ["ppo", *(part for option in (named | options | last).items() for part in option)]


@pytest.mark.slow
@pytest.mark.parametrize("value", ["shared", "own", "own with adapters, gold paid"])
def test_two_processes_equal_one(config: ppo.Config, tmp_path: Path, value: str) -> None:
    more = {"--value": config.model if "own" in value else f"{value}()"}
    if "paid" in value:
        more |= {"--value": f"model(path={config.model!r}, lora='lora(r=2)')"}
        more |= {"--gold-limits": "limits(every=2)", "--gold-budget": "30"}
    for name, processes in (("one", 1), ("two", 2)):
        launch.launch([_command(config, tmp_path / name, **more)], processes=processes)
    one, two = (Policy.load(tmp_path / name / "model").state_dict() for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    asked = [[row.get("gold") for row in read_metrics(tmp_path / name)] for name in ("one", "two")]
    assert asked[0] == asked[1]


@pytest.mark.slow
def test_a_killed_run_ends_where_another_does(config: ppo.Config, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    launch.launch([_command(config, whole, **{"--steps": "12"})], processes=1)
    process = launch.start(_command(config, cut, **{"--steps": "12"}))
    while not list((cut / "checkpoints").glob("step-3.safetensors")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (cut / "done.json").exists()
    launch.launch([_command(config, cut, **{"--steps": "12"})], processes=1)
    ours, theirs = ((folder / "model" / "model.safetensors").read_bytes() for folder in (cut, whole))
    assert ours == theirs


DIMENSIONS = """
- {id: long, dimension: size, sentence: and more, criterion: longer, gold: length()}
- {id: short, dimension: size, sentence: and less, criterion: shorter, gold: "weighted_sum(golds=['length()'],
     weights=[-1.0])"}
- {id: vowels, dimension: sound, sentence: with vowels, criterion: more vowels, gold: "length(unit='chars')"}
"""


@pytest.fixture
def preferring(config: ppo.Config, tmp_path: Path) -> ppo.Config:
    """Rewarded for the preferences of each prompt, by their golds."""
    (tmp_path / "mine.yaml").write_text(DIMENSIONS)
    wanted = Variants(str(tmp_path / "mine.yaml"), ("long+vowels", "short"))
    return replace(config, reward=("golds",), variants=wanted, steps=2)


def test_prompts_under_preferences_are_rewarded_for_them(preferring: ppo.Config) -> None:
    rows = read_metrics(ppo.run(preferring).folder)[1:]
    for row in rows:
        assert row["preferences long"] > 0 > row["preferences short"]
        assert row["preferences vowels"] >= row["preferences long"]  # characters, not words, of the same answers
    weights = ("long=1", "short=1", "vowels=0")
    heavy = replace(preferring, combine_rewards=weights, out=preferring.out / "w")
    first = read_metrics(ppo.run(heavy).folder)[1]
    assert first["preferences long"] == rows[0]["preferences long"]  # the same draws
    assert first["score"] < rows[0]["score"]  # characters count no longer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": Variants()}, "golds"),
        ({"variants": Variants(), "reward": ("length()",), "combine_rewards": ("min",)}, "give --dimensions"),
        ({"combine_rewards": ("long",)}, "weights as P1A=0.5"),
        ({"reward": ("long=a", "b")}, "ID=FOLDER for every option"),
    ],
)
def test_preferences_that_cannot_be_rewarded_are_refused(
    preferring: ppo.Config, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ppo.run(replace(preferring, **options))
    assert not preferring.out.exists()
