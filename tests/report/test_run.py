import json
import re

import pytest

from pyrite.report import run_page


def write(folder, **files):
    for name, value in files.items():
        if name == "metrics":
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in value))
        else:
            (folder / f"{name}.json").write_text(json.dumps(value))


METRICS = [{"step": i, "loss": 0.7 - 0.01 * i, "note": "x", "rare": 1.0 if i == 3 else None} for i in range(9)]
METRICS += [{"step": 9, "loss": float("nan"), "accuracy": 0.5}, {"step": 10, "accuracy": 0.6}]


def test_a_finished_run(tmp_path, read_page):
    write(
        tmp_path, config={"job": "reward", "lr": 5e-4, "model": {"path": "<b>"}}, manifest={"pyrite": "0.1.0"},
        metrics=METRICS, done={"accuracy": 0.71, "path": "model", "seconds": 12.5},
    )  # fmt: skip
    read = read_page(run_page(tmp_path))
    assert read.errors == []
    names = [a["aria-label"].split(":")[0] for a in read.all("div") if a.get("class") == "chart"]
    assert names == ["loss", "accuracy"]
    assert "12.5 seconds" in read.text and "model.path<b>" in read.text and "accuracy0.71" in read.text


def test_a_value_stands_beside_its_standard_error_also_below_0(tmp_path, read_page):
    rows = [{"step": i, "part": "ppo", "kl_k1": -0.02 + 0.01 * i, "kl_k1_se": 0.03} for i in range(3)]
    rows[1]["kl_k1_se"] = None
    write(tmp_path, config={"job": "ppo"}, metrics=rows, done={"start": rows[0], "last": rows[-1], "answers": 9})
    html = run_page(tmp_path)
    read = read_page(html)
    assert read.errors == []
    assert "−0.02 ± 0.03" in read.text and "0 ± 0.03" in read.text
    (chart,) = [a["aria-label"] for a in read.all("div") if a.get("class") == "chart"]  # the error is its band
    assert "-0.02 at step 0" in chart
    named = r'"hi":([^,]+),"label":"","line":"ppo","lo":([^,]+),"shown":"([^"]+)"'
    points = re.findall(named, html[html.index('"points":') :])
    assert [float(value) for value in points[0][:2]] == pytest.approx([0.01, -0.05])
    assert points[0][2] == "-0.02 ± 0.03" and points[1] == ("null", "null", "-0.01")


def test_means_of_an_evaluation_stand_beside_their_errors(tmp_path, read_page):
    done = {"answers": 3, "gold": {"mean": 1.25, "se": 0.5}, "kl_k1": {"mean": -0.5, "se": 0.25}}
    write(tmp_path, config={"job": "evaluate"}, done=done)
    text = read_page(run_page(tmp_path)).text
    assert "1.25 ± 0.5" in text and "−0.5 ± 0.25" in text


def test_a_run_that_is_not_finished_and_has_no_metrics(tmp_path, read_page):
    write(tmp_path, config={"job": "sft"})
    read = read_page(run_page(tmp_path))
    assert read.errors == [] and "not finished" in read.text and "Metrics" not in read.text


def test_metrics_without_steps_are_counted(tmp_path, read_page):
    write(tmp_path, config={"job": "sft"}, metrics=[{"loss": 2.0}, {"loss": 1.0}])
    read = read_page(run_page(tmp_path))
    assert "loss: 2.00 at step 0" in next(a["aria-label"] for a in read.all("div") if a.get("class") == "chart")


def test_a_long_log_is_thinned_and_says_so(tmp_path, read_page):
    write(tmp_path, config={"job": "sft"}, metrics=[{"step": i, "loss": float(i)} for i in range(1300)])
    html = run_page(tmp_path)
    assert "one value in 3 is drawn" in read_page(html).text
    assert html.count('"line":"loss"') == 434


def test_no_run_there(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json there"):
        run_page(tmp_path)


def test_a_broken_file_is_named_with_its_line(tmp_path):
    write(tmp_path, config={"job": "sft"})
    (tmp_path / "done.json").write_text('{\n"a": }')
    with pytest.raises(ValueError, match=r"done\.json: not JSON \(.*line 2\)"):
        run_page(tmp_path)
