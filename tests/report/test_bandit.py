import pytest

from pyrite.report.bandit import bandit_page, convergence


def sampler(order, **options):
    means = {key: {"mean": 0.1, "lo": None, "hi": None} for key in ("value_gap", "reward", "kl")}
    figures = {"order": order, "step_order": order, "rate": 4.4, "contraction": 0.5, "steps_to_0.01": 7.0}
    rest = {"steps_to_1e-06": None, "error": 1e-9, "drift": 0.0, "diverged": 0.0, "bound": None, "floor": None}
    return figures | rest | means | options


@pytest.fixture
def results():
    bound = {"constant": 0.588, "order": 1, "holds": 1.0, "closest": 0.2}
    floor = {"measured": {"mean": 0.0123, "lo": None, "hi": None}, "predicted": None}
    curves = []
    for name, base in (("uniform", 0.1), ("mix_r", 0.01)):
        for step, value in enumerate([1.0, base, base**2, 0.0]):
            figures = {f"{key}{end}": value for key in ("error", "value_gap") for end in ("", "_lo", "_hi")}
            curves.append({"sampler": name, "step": step, **figures})
    config = {"samples": None, "actions": 20, "beta": 3.0, "rate": "matched", "instances": 200, "seeds": 5}
    samplers = {"uniform": sampler(1.0, bound=bound), "mix_r": sampler(2.0, floor=floor)}
    return {"recipe": "bandit", "config": config, "samplers": samplers, "curves": curves}


def test_the_page_opens_and_says_what_was_found(results, read_page):
    read = read_page(bandit_page(results))
    assert read.errors == []
    charts = [a["aria-label"] for a in read.all("div") if a.get("class") == "chart"]
    assert len(charts) == 2 and "uniform: 0.00 at step 0" in charts[0] and "-16.00 at 3" in charts[0]
    for text in ("20 responses, β = 3, exact gradients", "1,000 instances", "0.588", "Noise floor", "0.012"):
        assert text in read.text


def test_without_bounds_and_floors_there_is_nothing_of_them(results, read_page):
    for found in results["samplers"].values():
        found |= {"bound": None, "floor": None}
    results["config"]["samples"] = 8192
    read = read_page(bandit_page(results))
    assert "Noise floor" not in read.text and "bounds" not in read.text and "8,192 pairs drawn a step" in read.text


def test_steps_without_a_finite_value_are_left_out(results):
    for row in results["curves"]:
        if row["sampler"] == "mix_r" and row["step"] > 1:
            row |= {"error": None, "error_lo": None, "error_hi": None}
    points = convergence(results["curves"]).to_dict()["datasets"]["points"]
    assert [point["step"] for point in points if point["line"] == "mix_r"] == [0, 1]


def test_no_curves_are_refused(results):
    with pytest.raises(ValueError, match="no row has both step and error"):
        bandit_page(results | {"curves": []})
