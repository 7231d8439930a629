"""The judge job: asking, estimates, resuming, sheets for people, agreement, and its use as the judge of other jobs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from judges.server import Server, truth

from pyrite import cli
from pyrite.core.runs import RunError, read_json
from pyrite.data import rows as data
from pyrite.data.files import DataError, read
from pyrite.data.rows import load
from pyrite.feedback.judges import WINS, JudgeOptions
from pyrite.feedback.ledger import GoldStopped, Ledger
from pyrite.jobs import judge, label, online
from pyrite.training.evaluation import Evaluation
from pyrite.training.loop import Training

PREFERENCE = {"A": 1, "B": 2, "TIE": 0}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture
def config(server: Server, pairs: Path, tmp_path: Path) -> judge.Ask:
    options = JudgeOptions(base_url=server.url, backoff=0.01, price_in=1.0, price_out=2.0)
    return judge.Ask("toy", "more words", tmp_path / "run", str(pairs), judge=options)


def test_verdicts_of_pairs(config: judge.Ask, server: Server, pairs: Path) -> None:
    run = judge.run(config)
    rows, given = read(str(config.out / "verdicts.parquet")).rows, load(pairs, "pairs")
    assert [(row["prompt_id"], row["prompt"]) for row in rows] == [(row["prompt_id"], row["prompt"]) for row in given]
    for row, pair in zip(rows, given, strict=True):
        assert (row["a"], row["b"]) == (pair["chosen"], pair["rejected"])
        assert row["preference"] == PREFERENCE[truth(row["a"], row["b"])]
        assert row["p"] == row["p_ab"] == row["p_ba"] == WINS[truth(row["a"], row["b"])]  # type: ignore
        assert (row["criterion"], row["model"], row["order"], len(row["raw"])) == ("more words", "toy", "both", 2)
    assert run.results
    counts = [run.results[name] for name in ("first", "second", "ties", "no_verdict")]
    assert counts == [sum(row["preference"] == x for row in rows) for x in (1, 2, 0, None)]
    assert run.results["calls"] == run.results["answers"]["calls"] == 160
    assert judge.run(config).results == run.results
    again = judge.run(replace(config, out=config.out.with_name("again"), ledger=config.out / "ledger.db"))
    assert again.results and again.results["calls"] == 0
    assert len(server.bodies) == 160
    with pytest.raises(RunError, match="criterion"):
        judge.run(replace(config, criterion="fewer words"))


def test_an_estimate_asks_nobody(config: judge.Ask, server: Server) -> None:
    found = judge.run(replace(config, estimate=True)).results
    assert found
    assert (found["questions"], found["requests"], found["answered"]) == (160, 160, 0)
    assert found["cost"] == pytest.approx((found["tokens_in"] + 2 * found["tokens_out"]) / 1e6)
    assert found["tokens_in"] > 160 * 20
    assert (server.bodies, config.out.exists()) == ([], False)
    judge.run(config)
    after = judge.run(replace(config, estimate=True)).results
    assert after and (after["questions"], after["answered"], after["cost"]) == (0, 160, 0.0)


def test_a_run_out_of_money_goes_on_with_more(config: judge.Ask, server: Server) -> None:
    options = replace(config.judge, price_in=1000.0, max_tokens=1, max_cost=5.0)
    with pytest.raises(GoldStopped, match="raise max_cost"):
        judge.run(replace(config, judge=options))
    asked = len(server.bodies)
    assert 0 < asked < 160
    assert not (config.out / "config.json").exists()
    run = judge.run(replace(config, judge=replace(options, max_cost=200.0, concurrency=2)))
    assert run.results and run.results["calls"] == 160 - asked
    assert len(server.bodies) == 160


def test_candidates_are_paired(config: judge.Ask, server: Server, candidates: Path) -> None:
    path = candidates / "candidates.parquet"
    run = judge.run(replace(config, pairs=None, candidates=str(path)))
    rows = read(str(config.out / "verdicts.parquet")).rows
    assert run.results and run.results["pairs"] == len(rows) > 20
    answers = {(row["prompt_id"], row["sample"]): row for row in load(path, "candidates")}
    for row in rows:
        a, b = answers[row["prompt_id"], row["sample_a"]], answers[row["prompt_id"], row["sample_b"]]
        assert (a["response"], b["response"], row["sample_b"]) == (row["a"], row["b"], row["sample_a"] + 1)
        assert a["finished"] and b["finished"]


def test_the_judge_reads_the_prompt_without_its_preferences(config: judge.Ask, server: Server, tmp_path: Path) -> None:
    row = {"prompt": "why? Be brief.", "asked": "why?", "preferences": ["P2A"], "chosen": "x y", "rejected": "z"}
    data.write([row], tmp_path / "rows.jsonl")
    judge.run(replace(config, pairs=str(tmp_path / "rows.jsonl")))
    assert not any("brief" in json.dumps(body) for body in server.bodies)
    found = read(str(config.out / "verdicts.parquet")).rows[0]
    assert (found["prompt"], found["asked"], found["preferences"]) == ("why? Be brief.", "why?", ["P2A"])


def test_what_cannot_be_is_refused(config: judge.Ask, server: Server, pairs: Path) -> None:
    for wrong in (replace(config, pairs=None), replace(config, candidates=str(pairs))):
        with pytest.raises(ValueError, match="either --pairs or --candidates"):
            judge.run(wrong)
    with pytest.raises(DataError, match="no file"):
        judge.run(replace(config, pairs="nothing.jsonl"))
    assert (server.bodies, config.out.exists()) == ([], False)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_people_and_a_model_compared(config: judge.Ask, pairs: Path, tmp_path: Path, form: str) -> None:
    judge.run(config)
    export = judge.Export("more words", tmp_path / "sheet", str(pairs), format=form)  # type: ignore
    judge.run(export)
    sheet = tmp_path / "sheet" / f"pairs.{form}"
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file)) if form == "csv" else [json.loads(line) for line in file]
    for i, row in enumerate(rows):
        row["better"] = "" if i < 5 else truth(row["answer_A"], row["answer_B"])
    data.write(rows[::-1], tmp_path / "filled.jsonl")
    taken = judge.Import(str(tmp_path / "filled.jsonl"), tmp_path / "sheet", tmp_path / "people", "me")
    found = judge.run(taken).results
    assert found and found["no_verdict"] == 5
    verdicts = [str(folder / "verdicts.parquet") for folder in (config.out, tmp_path / "people")]
    compared = judge.run(judge.Agreement(verdicts[0], tmp_path / "agreement", verdicts[1])).results
    assert compared
    assert compared["both"]["agreement"] == {"value": 1.0, "lo": 1.0, "hi": 1.0, "n": 75}
    assert compared["both"]["kappa"]["value"] == pytest.approx(1.0)
    assert (compared["both"]["without_a_verdict"], compared["second"]["no_verdict"]["value"]) == (5, 5 / 80)
    assert compared["first"]["consistency"]["value"] == 1.0
    assert compared["second"]["consistency"]["value"] is None
    assert read_json(tmp_path / "agreement" / "agreement.json")["both"] == compared["both"]
    alone = judge.run(judge.Agreement(verdicts[0], tmp_path / "alone")).results
    assert alone and set(alone) == {"first", "seconds"}
    with pytest.raises(ValueError, match="no export there"):
        judge.run(replace(taken, exported=tmp_path, out=tmp_path / "other"))
    with pytest.raises(ValueError, match="--level 2"):
        judge.run(judge.Agreement(verdicts[0], tmp_path / "wrong", level=2.0))


def test_as_the_judge_of_label(server: Server, candidates: Path, tmp_path: Path) -> None:
    spec = f"llm(model='toy', criterion='more words', base_url='{server.url}', ledger='{tmp_path / 'j.db'}')"
    path = str(candidates / "candidates.parquet")
    first = label.run(label.Config(path, tmp_path / "llm", judge=spec, ties="drop")).results
    gold = label.run(label.Config(path, tmp_path / "gold", gold="length()", ties="drop")).results
    assert first and gold
    assert first["pairs"] == gold["pairs"] > 10
    by_judge, by_gold = (load(tmp_path / name / "pairs.parquet", "pairs") for name in ("llm", "gold"))
    assert [row["chosen"] for row in by_judge] == [row["chosen"] for row in by_gold]
    asked = len(server.bodies)
    label.run(label.Config(path, tmp_path / "again", judge=spec))
    assert len(server.bodies) == asked


def test_as_the_judge_of_online(server: Server, tiny: Path, demos: Path, tmp_path: Path) -> None:
    spec = f"llm(model='toy', criterion='more words', base_url='{server.url}', ledger='{tmp_path / 'gold.db'}')"
    config = online.Config(
        str(tiny),
        str(demos),
        spec,
        tmp_path / "run",
        held_out=0.2,
        rounds=1,
        prompts_per_round=8,
        gold_budget=6,
        gold_limits=f"limits(ledger={str(tmp_path / 'gold.db')!r}, batch=6)",
        evaluation=Evaluation(gold="length()", max_new_tokens=8),
        training=Training(lr=1e-3, batch_size=8, lr_scheduler_type="cosine(warmup_steps=0)"),
    )
    online.run(config)
    with Ledger(tmp_path / "gold.db") as ledger:  # labels and the model's answers in one file
        assert [(row["kind"], row["answered"]) for row in ledger.summary()] == [("completion", 12), ("verdict", 6)]
    assert len(server.bodies) == 12


def test_the_command_line(
    config: judge.Ask, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "sk-nobody-may-see-this"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    command = ["pyrite", "judge", "ask", "--pairs", str(config.pairs), "--model", "toy", "--criterion", "more words"]
    command += ["--base-url", server.url, "--out", str(config.out), "--no-both-orders"]
    monkeypatch.setattr("sys.argv", [*command, "--estimate"])
    cli.main()
    assert "80 questions in 80 requests, 0 answered" in capsys.readouterr().err
    server.always = "401"
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr()
    assert "check the key in OPENAI_API_KEY" in said.err
    server.always = ""
    cli.main()
    monkeypatch.setattr("sys.argv", ["pyrite", "ledger", "show", str(config.out / "ledger.db")])
    cli.main()
    said = [*said, *capsys.readouterr()]
    assert "total: 80 answers" in said[2]
    assert secret not in "".join(said)
    assert server.keys == {f"Bearer {secret}"}
    for path in config.out.rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes()
