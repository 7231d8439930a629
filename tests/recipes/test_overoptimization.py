"""The recipe end to end on a small chain, and its claims on simulated curves whose truth is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyrite.jobs import best_of_n, sft
from pyrite.math import statistics
from pyrite.recipes import overoptimization as recipe
from pyrite.recipes import study
from pyrite.recipes.overoptimization import OveroptimizationSettings
from pyrite.training.loop import Training

TOY = recipe.SETTINGS["toy"]
SMALL = replace(
    TOY,
    toy_demos=400,
    sft=Training(lr=4e-3, epochs=1, batch_size=32),
    pair_limit=20,
    pair_answers=4,
    pool=6,
    answers=24,
    members=2,
    reward=Training(lr=5e-4, epochs=1, batch_size=16),
    n=(1, 2, 4, 8),
    shares=(0.5,),
    sizes=("small",),
    prompts_per_step=16,
    steps=4,
    measure_every=2,
    eval_k=2,
)


TOY_SHORT = replace(TOY, n=(1, 4, 16, 64, 256))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> OveroptimizationSettings:
    monkeypatch.setitem(recipe.SETTINGS, "toy", SMALL)
    return SMALL


def test_recipe_runs_once_and_is_returned_when_done(small: OveroptimizationSettings, tmp_path: Path) -> None:
    config = study.Config(out=tmp_path / "run")
    page = recipe.RECIPE.run(config)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert page.exists() and "<html" in page.read_text()
    assert {row["noise"] for row in found["curves"]} == {0.25, 0.0}
    assert {row["objective"] for row in found["curves"]} == {"single", "mean", "wco", "uwo", "member"}
    labels = json.loads((tmp_path / "run" / "seed_0" / "pool_labels" / "config.json").read_text())
    assert labels["seed"] == 0  # as earlier versions have it, whose runs go on
    missing = {claim.id for claim in recipe.CLAIMS} - {row["id"] for row in found["claims"]}
    few = {"four-members-beat-three-25", "five-members-like-four-25"}  # two members were trained
    assert missing == few | {f"ppo-{name}-best-beta" for name in ("mean", "wco", "uwo")}  # and two betas tried
    assert all(row["holds"] in (True, False, None) for row in found["claims"])
    assert all(row["interval"] is None or row["interval"][0] <= row["interval"][1] for row in found["claims"])
    assert found["mechanism"]["truncated"]["share_among_winners"] == 0.0
    _check_policies(found)
    assert len(found["reward_models"]) == 2 * SMALL.members
    assert {path.suffix for path in (tmp_path / "run" / "figures").iterdir()} == {".svg", ".png"}
    before = page.stat().st_mtime_ns
    assert recipe.RECIPE.run(config) == page and page.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="another config"):
        recipe.RECIPE.run(replace(config, seeds=2))


def _check_policies(found: dict) -> None:
    """Every objective at every KL strength starts at the same gold and KL 0; one chain decides nothing about PPO."""
    trained = {(row["beta"], row["objective"]) for row in found["policies"]}
    assert trained == {(beta, name) for beta in (0.0, 0.05) for name in ("single", "mean", "wco", "uwo")}
    starts = [row for row in found["policies"] if row["step"] == 0]
    assert len({row["gold"] for row in starts}) == 1 and all(abs(row["kl"]) < 1e-3 for row in starts)
    assert all(row["kl"] > 0 for row in found["policies"] if row["step"] == 4)
    assert all(row["holds"] is None for row in found["claims"] if row["id"].startswith("ppo-"))
    assert {row["group"] for row in found["bars"]} == {"weight", "members", "pairs", "size"}


def test_recipe_goes_on_after_a_stop(
    small: OveroptimizationSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = study.Config(out=tmp_path / "run")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(best_of_n, "run", stop)
        recipe.RECIPE.run(config)
    made = (tmp_path / "run" / "seed_0" / "sft" / "model" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(sft.loop, "fit", stop)  # nothing is trained again
    with pytest.raises(KeyboardInterrupt):
        recipe.RECIPE.run(config)  # the reward models of the second noise level are still to be trained
    assert (tmp_path / "run" / "seed_0" / "best_of_n_noise_25" / "done.json").exists()
    assert (tmp_path / "run" / "seed_0" / "sft" / "model" / "model.safetensors").stat().st_mtime_ns == made


def simulated(seed: int, *, fooled: bool, prompts: int = 200, answers: int = 1024) -> recipe.Pool:
    """Gaussian gold; each proxy sees it through noise and, if fooled, overrates its own rare bad answers."""
    g = torch.Generator().manual_seed(seed)
    gold = torch.randn(prompts, answers, generator=g, dtype=torch.float64)
    proxies, marked = [], torch.zeros(prompts, answers, dtype=torch.bool)
    for _ in range(5):
        rare = torch.rand(prompts, answers, generator=g) < (0.005 if fooled else 0.0)
        proxies.append((rare, gold + 0.7 * torch.randn(prompts, answers, generator=g, dtype=torch.float64)))
        marked |= rare
    truth = gold - 3.0 * marked
    proxy = torch.stack([p + 6.0 * rare for rare, p in proxies])
    standard = (proxy - proxy.mean((1, 2), keepdim=True)) / proxy.std((1, 2), correction=0, keepdim=True)
    row = torch.arange(prompts * answers).view(prompts, answers)
    return recipe.Pool((truth - truth.mean()) / truth.std(correction=0), standard, marked, row, [])


def by_id(pools: list[recipe.Pool], settings: OveroptimizationSettings) -> dict[str, dict]:
    golds = [{(0.25, name): gold for name, gold in recipe.gold_at(pool, settings).items()} for pool in pools]
    return {row["id"]: row for row in recipe.check_best_of_n(golds, end=settings.n.index(256))}


def test_claims_on_a_world_that_is_overoptimized() -> None:
    found = by_id([simulated(0, fooled=True)], TOY)
    assert found["single-overoptimizes-25"]["holds"] is True
    assert found["gain-wco-25"]["holds"] is True and found["gain-uwo-25"]["holds"] is True
    assert found["wco-does-not-overoptimize-25"]["holds"] is True
    assert "gain-wco-0" not in found  # that noise level was not run


def test_claims_on_a_world_that_is_not() -> None:
    found = by_id([simulated(0, fooled=False)], TOY)
    assert found["single-overoptimizes-25"]["holds"] is not True
    assert abs(found["single-overoptimizes-25"]["measured"]) < 0.02


def test_claims_over_several_chains_use_their_spread() -> None:
    found = by_id([simulated(seed, fooled=True, prompts=40) for seed in range(3)], TOY)
    row = found["gain-wco-25"]
    want = statistics.t_interval(torch.tensor(row["by_seed"], dtype=torch.float64))
    assert len(row["by_seed"]) == 3 and row["interval"] == pytest.approx([want.lo.item(), want.hi.item()])


def test_a_peak_is_not_created_by_looking_for_it() -> None:
    """On curves of pure noise the cross-fitted fall is zero on average; the naive one is not."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 2, 9, generator=g, dtype=torch.float64)
    fair = study.Curves({"single": noise}, {"single": noise.flip(1)}).fall("single").mean(1)
    naive = (noise.amax(-1) - noise[:, :, 8]).mean(1)
    error = (fair.std() / len(fair) ** 0.5).item()
    assert abs(fair.mean().item()) < 4 * error
    assert naive.mean().item() > 20 * error


def test_bootstrap_of_the_gain_covers_its_truth() -> None:
    """True gain 0.5, with effects of members and prompts: covered at least as often as promised; 0 never is."""
    g = torch.Generator().manual_seed(1)
    covered, fooled = 0, 0
    for _ in range(100):
        member, prompt = torch.randn(5, 1, 1, generator=g) * 0.1, torch.randn(1, 1, 60, generator=g) * 0.3
        single = (prompt + member + 0.2 * torch.randn(5, 2, 60, generator=g)).double()
        ensemble = (0.5 + prompt[0] + 0.2 * torch.randn(2, 60, generator=g)).double()
        claim = study.Claim("", "", "", lambda c: (c.own["wco"] - c.own["single"])[..., -1].mean(1))
        lo, hi = study.bootstrap(claim, study.halves({"single": single, "wco": ensemble}, resamples=300))
        covered += lo <= 0.5 <= hi
        fooled += lo <= 0.0 <= hi
    assert covered >= 85  # five members leave a percentile interval a little narrow
    assert fooled == 0


@pytest.mark.parametrize(
    ("rule", "interval", "want"),
    [
        (study.within(), (0.1, 0.3), True),
        (study.within(), (-0.1, 0.3), None),
        (study.within(), (-0.3, -0.1), False),
        (study.negligible(0.1), (-0.2, 0.05), True),
        (study.negligible(0.1), (-0.1, 0.3), None),
        (study.negligible(0.1), (0.05, 0.3), False),
        (study.contains(0.75), (0.5, 0.9), True),
        (study.contains(0.75), (0.1, 0.3), False),
    ],
)
def test_verdicts(rule: study.Rule, interval: tuple[float, float], want: bool | None) -> None:
    claim = study.Claim("id", "source", "statement", float, rule)
    (row,) = study.check([claim], [0.2], alone=lambda _, __: interval)
    assert row["holds"] is want


def test_win_rates_are_counted_against_every_member() -> None:
    picked = recipe.gold_at(simulated(0, fooled=True, prompts=40, answers=300), TOY_SHORT)
    assert picked["wins of wco"].shape == picked["single"].shape
    want = (picked["wco"][3] > picked["single"][2, 3]).double()
    assert torch.equal(picked["wins of wco"][2, 3], want)
    found = recipe.above_half("wins of wco")(study.halves({("wins of wco",): picked["wins of wco"]}, points=4)).item()
    assert found == pytest.approx(picked["wins of wco"][:, 3].mean().item() - 0.5)


def test_a_ratio_to_nothing_is_undefined() -> None:
    """Where single models end without gold the size of the gain means nothing, and no verdict is given."""
    scores = simulated(0, fooled=True)
    row = by_id([scores], TOY)["size-of-gain-25"]
    assert row["holds"] is None and row["measured"] is None


def test_exclusion_takes_out_exactly_the_marked_answers() -> None:
    scores = simulated(0, fooled=True, prompts=20, answers=200)
    rest = scores.without_marked()
    assert not rest.mark.any()
    assert rest.gold.shape[1] == int((~scores.mark).sum(1).min())
    flat: Tensor = scores.gold.flatten()
    assert torch.equal(flat[rest.row.flatten()].view_as(rest.gold), rest.gold)  # gold stays with its answer


@pytest.mark.slow
def test_toy_scale_shows_overoptimization(tmp_path: Path) -> None:
    """One whole chain at full size; its seed was not used to choose any setting."""
    recipe.RECIPE.run(study.Config(out=tmp_path / "run"))
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    single = {r["n"]: r for r in found["curves"] if r["noise"] == 0.25 and r["objective"] == "single"}
    risen = {key: single[1024][key] - single[64][key] for key in ("gold", "proxy")}
    assert risen["proxy"] > 0.3 and risen["gold"] < 0.2 * risen["proxy"]
    assert {row["id"]: row["holds"] for row in found["claims"]}["gain-uwo-25"] is True
    assert found["mechanism"]["truncated"]["rate"] < 0.001


def policies(gold: Tensor, *, objective: str = "single", beta: float = 0.0) -> list[dict]:
    """The measurements of one policy a chain, with this gold (C, M)."""
    known = {"noise": 0.25, "beta": beta, "objective": objective}
    return [
        {"seed": seed, **known, "step": i, "gold": value, "variance": 1.0 + i}
        for seed, line in enumerate(gold.tolist())
        for i, value in enumerate(line)
    ]


def test_a_policy_that_rises_and_falls_is_overoptimized() -> None:
    rise = torch.tensor([0.0, 1.0, 2.0, 2.5, 2.0, 1.0, 0.0, -1.0])
    rows = policies(rise + 0.1 * torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    (row,) = recipe.check_ppo(rows)
    assert row["id"] == "ppo-single-overoptimizes"
    assert row["holds"] is True and len(row["by_seed"]) == 5
    assert row["measured"] == pytest.approx(2.5 - 1 / 3 + 0.5, abs=0.2)  # smoothed over three: 6.5 / 3 and -1 / 2
    assert recipe.check_ppo([row for row in rows if row["seed"] == 0])[0]["holds"] is None
    assert recipe.check_ppo([]) == []


def test_a_peak_of_policies_is_not_created_by_looking_for_it() -> None:
    """On noise alone the fall at the others' peak is zero on average; at a chain's own peak it is not."""
    noise = torch.randn(3000, 5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    others = (noise.sum(1, keepdim=True) - noise) / 4
    fair = study.Curves({"single": noise}, {"single": others}).fall("single").mean(1)
    naive = (noise.amax(2) - noise[:, :, -1]).mean(1)
    error = (fair.std() / len(fair) ** 0.5).item()
    assert abs(fair.mean().item()) < 4 * error < 0.1
    assert naive.mean().item() > 10 * error


def test_the_gain_of_an_ensemble_is_taken_at_the_end_and_needs_both() -> None:
    flat = torch.zeros(4, 6)
    found = {row["id"]: row for row in recipe.check_ppo(policies(flat) + policies(flat + 1.0, objective="wco"))}
    assert found["ppo-wco-gain-free"]["measured"] == 1.0 and found["ppo-wco-gain-free"]["holds"] is True
    assert "ppo-uwo-gain-free" not in found and "ppo-wco-gain-small" not in found


def test_the_best_kl_strength_is_chosen_on_other_chains() -> None:
    """Each chain likes another beta by luck: chosen on the others, the luck does not count."""
    ends = {0.0: [1.0, 0.0, 0.0], 0.1: [0.0, 1.0, 0.0], 0.2: [0.0, 0.0, 1.0]}
    rows = []
    for beta, values in ends.items():
        for objective in ("single", "uwo"):
            gold = torch.tensor(values)[:, None].expand(3, 4) * (objective == "uwo")
            rows += policies(gold, objective=objective, beta=beta)
    (row,) = [row for row in recipe.check_ppo(rows) if row["id"] == "ppo-uwo-best-beta"]
    assert row["measured"] < 0.4  # on its own best each chain would have 1
