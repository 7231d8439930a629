"""The command line: help, lists, YAML under options, dry runs, and every bad input as one line."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from pyrite import cli, jobs
from pyrite.cli import commands
from pyrite.cli.parse import parse
from pyrite.data import rows as data
from pyrite.jobs import best_of_n, reward, sft
from pyrite.models.policy import Policy, RewardModel
from pyrite.training.loop import TrainingError
from tests import launch

JOBS = sorted(module.name for module in pkgutil.iter_modules(jobs.__path__))
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pyrite(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Exit status, standard output and standard error of a command."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["pyrite", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as error:
            status = int(error.code or 0)
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def parsed(schema: type, tmp_path: Path, yaml: str = "", *options: str):
    (tmp_path / "c.yaml").write_text(yaml)
    given = ["--model", "m", "--data", "d", "--out", "o"]
    return parse(schema, [*given, "--config", str(tmp_path / "c.yaml"), *options], prog="x")


COMMANDS = [f"judge {name}" for name in ("ask", "export", "import", "agreement")]


@pytest.mark.parametrize("job", [job for job in JOBS if job != "judge"] + COMMANDS)
def test_every_job_has_help(pyrite: Command, job: str) -> None:
    status, out, err = pyrite(*job.split(), "--help")
    assert (status, err) == (0, "")
    assert "--out" in out
    assert "(required)" in out


def test_a_job_with_several_commands(pyrite: Command) -> None:
    status, out, _ = pyrite("judge", "--help")
    assert status == 0
    assert all(f"pyrite judge {command}" in out for command in ("ask", "export", "import", "agreement"))


def test_a_sweep_runs_and_reads_one_reference(pyrite: Command, tiny: Path, pairs: Path, tmp_path: Path) -> None:
    options = ("--batch-size", 40, "--loss", "dpo(beta=0.1)", "dpo(beta=0.5)", "--seed", 0, 1)
    command = ("dpo", "--model", tiny, "--data", pairs, "--out", tmp_path / "sweep", *options)
    status, out, _ = pyrite(*command, "--dry-run")
    assert status == 0
    assert out.count('"reads"') == 4
    assert not (tmp_path / "sweep").exists()
    status, out, err = pyrite(*command)
    assert status == 0, err
    assert (err.count("reference: computed"), err.count("no forward pass")) == (1, 3)
    assert json.loads(out) == json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    table = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert next(iter(table)) == "loss=dpo(beta=0.1),seed=0"
    assert len(table) == 4
    assert all("accuracy" in row["last"] for row in table.values())
    assert (tmp_path / "sweep" / "loss=dpo(beta=0.5),seed=1" / "model" / "model.safetensors").exists()


def test_usage_names_everything(pyrite: Command) -> None:
    for arguments in ([], ["--help"], ["help"]):
        status, out, _ = pyrite(*arguments)
        assert status == 0
        assert all(job in out for job in JOBS)
        assert all(kind in out for kind in cli.KINDS)


@pytest.mark.parametrize("typed", ["", "--help", "--version", "list jobs", "list recipes", "winrate --help"])
def test_only_the_job_that_is_asked_for_is_loaded(typed: str) -> None:
    ask = "import sys\nfrom pyrite.cli import main\nmain()\nprint(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", ask, *typed.split()]
    done = subprocess.run(command, env=launch.environment(), capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert done.stdout and "pyrite.cli" in loaded
    job = typed.partition(" --help")[0] if " --help" in typed else ""
    assert {name for name in loaded if name.startswith("pyrite.jobs.")} == ({f"pyrite.jobs.{job}"} if job else set())
    assert job or not loaded & {"torch", "numpy", "transformers", "rich", "yaml"}


@pytest.mark.parametrize(
    ("kind", "member"),
    [
        ("ensembles", "uwo(weight=0.5)"),
        ("golds", "length(unit='words')"),
        ("losses", "dpo("),
        ("reward_losses", "bradley_terry("),
        ("jobs", "best_of_n"),
        ("recipes", "overoptimization"),
    ],
)
def test_list(pyrite: Command, kind: str, member: str) -> None:
    status, out, err = pyrite("list", kind)
    assert (status, err) == (0, "")
    assert member in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sfd"], "unknown command 'sfd'; did you mean 'sft'?"),
        (["list", "loses"], "did you mean 'losses'?"),
        (["list"], "choose one of"),
        (["list", "discriminators"], "`pyrite list annotators`"),
        (["recipe", "nothing"], "unknown recipe 'nothing'"),
        (["report"], "give one folder"),
        (["judge"], "choose one of ask, "),
        (["judge", "exprt"], "did you mean 'export'?"),
        (["reference", "compute", "--model", "x"], "reference compute is gone: `pyrite reference` alone computes"),
        (["reference", "verify"], "every answer is there, as the policy's tokens; it computes rows again only if"),
        (["sft", "--tokenizer", "x"], "unknown option --tokenizer"),
        (["judge", "ask", "--tokenizer", "x"], "--tokenizer is gone: an estimate takes a token to be four characters"),
        (["sft", "--config"], "--config needs a YAML file"),
        (["sft", "--modle", "x"], "unknown option --modle; did you mean 'model'?"),
        (["sft", "--modle=x"], "unknown option --modle; did you mean 'model'?"),
        (["sft", "--model", "m"], "--data"),
        (["sft", "--model", "m", "--data", "d", "--out", "o", "--epochs", "many"], "--epochs"),
        (["sft", "--model", "m", "--data", "d", "--out", "o", "--epochs", "0"], "--epochs 0: give at least 1"),
        (["sft", "--model", "m", "--data", "d", "--out", "o", "--lr-scheduler-type", "cosin"], "did you mean cosine?"),
        (["sft", "--model", "m", "--data", "d", "--out", "o", "--lora"], "--lora"),
    ],
)
def test_wrong_commands_are_one_line(pyrite: Command, arguments: list[str], words: str) -> None:
    status, out, err = pyrite(*arguments)
    assert status == 2
    assert words in err
    assert err.startswith("pyrite: ")
    assert err.count("\n") == 1
    assert out == ""


def test_yaml_lies_under_the_command_line(tmp_path: Path) -> None:
    yaml = 'lr: 1e-5\nbatch_size: 4\ntraining: {epochs: 7, optim: "adamw(betas=(0.5, 0.6))"}\n'
    yaml += "lora: lora(r=3)\ncolumns: null\n"
    config = parsed(sft.Config, tmp_path, yaml, "--batch-size", "9")
    assert config.training.lr == 1e-5
    assert config.training.batch_size == 9
    assert config.training.epochs == 7
    assert config.training.optim == "adamw(betas=(0.5, 0.6))"
    assert config.lora == "lora(r=3)"
    assert config.columns is None
    assert parsed(sft.Config, tmp_path) == sft.Config("m", "d", Path("o"))
    same = parse(sft.Config, ["--model=m", "--data=d", f"--config={tmp_path / 'c.yaml'}", "--out=o"], prog="x")
    assert same == sft.Config("m", "d", Path("o"))


def test_yaml_lists_and_switches(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("candidates: c\nproxy: r\nout: o\nn: [1, 2]\nobjectives: ['wco()', 'mean()']\n")
    config = parse(best_of_n.Config, ["--config", str(tmp_path / "c.yaml")], prog="x")
    assert config == best_of_n.Config("c", "r", Path("o"), objectives=("wco()", "mean()"), n=(1, 2))
    from pyrite.jobs import label

    (tmp_path / "l.yaml").write_text("candidates: c\ngold: length()\nout: o\npairs: false\n")
    assert parse(label.Config, ["--config", str(tmp_path / "l.yaml")], prog="x").pairs is False


def test_held_out_is_a_share_or_a_file(tmp_path: Path) -> None:
    assert parsed(reward.Config, tmp_path).held_out == 0.1
    assert parsed(reward.Config, tmp_path, "", "--held-out", "0.25").held_out == 0.25
    assert parsed(reward.Config, tmp_path, "held_out: 0.3").held_out == 0.3
    assert parsed(reward.Config, tmp_path, "", "--held-out", "pairs.jsonl").held_out == "pairs.jsonl"


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("batchsize: 3", "unknown option 'batchsize'; did you mean 'batch-size'?"),
        ("trainin: {lr: 1}", "unknown group 'trainin'; did you mean 'training'?"),
        ("training: {epoch: 1}", "unknown option 'epoch'; did you mean 'epochs'?"),
        ("- lr", "give one option a line"),
        ("lr: [1", "cannot be read as YAML"),
    ],
)
def test_wrong_yaml(tmp_path: Path, yaml: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"c\.yaml") as error:
        parsed(sft.Config, tmp_path, yaml)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_options_of_earlier_versions_are_refused_with_their_new_names(
    pyrite: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = {"--speed": "--nothing or --lr", "--wings": "models do not fly; walk", "--seed": "--lr"}
    monkeypatch.setattr("pyrite.cli.help.OLD_NAMES", old)
    base = ("sft", "--model", "m", "--data", "d", "--out", "o")
    assert pyrite(*base, "--speed", "1") == (2, "", "pyrite: --speed is now --lr\n")
    assert pyrite(*base, "--no-wings") == (2, "", "pyrite: --wings is gone: models do not fly; walk\n")
    assert "--seed x: is no whole number" in pyrite(*base, "--seed", "x")[2]  # still an option of this job
    for yaml in ("speed: 1", "training: {speed: 1}", "motion: {lr: 1, speed: 1}"):
        (tmp_path / "c.yaml").write_text(yaml)
        status, _, err = pyrite(*base, "--config", tmp_path / "c.yaml")
        assert (status, err) == (2, f"pyrite: {tmp_path / 'c.yaml'}: --speed is now --lr\n")


def test_a_yaml_file_that_is_not_there(pyrite: Command) -> None:
    status, _, err = pyrite("sft", "--config", "nowhere.yaml")
    assert status == 2
    assert "nowhere.yaml: cannot be read" in err


def test_dry_run_shows_and_writes_nothing(pyrite: Command, tiny: Path, demos: Path, tmp_path: Path) -> None:
    command = ("sft", "--dry-run", "--model", tiny, "--data", demos, "--out", tmp_path / "run", "--lr", "0.5")
    status, out, _ = pyrite(*command)
    assert status == 0
    plan = json.loads(out)
    assert plan["config"]["training"]["lr"] == 0.5
    assert plan["reads"] == {"model": str(tiny), "data": str(demos)}
    assert plan["writes"] == sft.OUTPUTS
    assert list(tmp_path.iterdir()) == []


def test_a_job_runs_and_says_where(pyrite: Command, tiny: Path, demos: Path, tmp_path: Path) -> None:
    arguments = ("sft", "--model", tiny, "--data", demos, "--out", tmp_path / "run", "--batch-size", "30")
    status, out, err = pyrite(*arguments)
    assert status == 0, err
    assert f"sft: done, in {tmp_path / 'run'}" in err
    assert '"perplexity"' in out
    status, out, err = pyrite(*arguments, "--lr", "0.5")
    assert status == 2
    assert "training.lr: 1e-05 there, 0.5 now" in err
    assert err.count("\n") == 1
    status, out, _ = pyrite("report", tmp_path / "run")
    assert status == 0
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


def test_report_of_a_sweep_is_a_page_for_each_run(pyrite: Command, tmp_path: Path) -> None:
    for name in ("beta_0.1", "beta_0.2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"job": "dpo"}')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    status, _, err = pyrite("report", tmp_path)
    assert status == 0
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    for name in ("beta_0.1", "beta_0.2"):
        assert "not finished" in (tmp_path / name / "report.html").read_text()
    (tmp_path / "empty").mkdir()
    status, out, err = pyrite("report", tmp_path / "empty")
    assert status == 2 and "give the --out folder of a job, a sweep or a recipe" in out + err


def test_expected_errors_are_one_line_and_others_are_not_hidden(
    pyrite: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (ValueError("a\n  b"), TrainingError("a b"), PermissionError("a b")):
        monkeypatch.setattr(commands, "_command", lambda _, error=error: (_ for _ in ()).throw(error))
        status, out, err = pyrite("x")
        assert (status, out) == (2, "")
        assert err.startswith("pyrite: ") and err.endswith("a b\n") and err.count("\n") == 1
    monkeypatch.setattr(commands, "_command", lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
    status, _, err = pyrite("x")
    assert status == 130
    assert "run the same command again" in err
    monkeypatch.setattr(commands, "_command", lambda _: {}["missing"])
    with pytest.raises(KeyError):
        pyrite("x")


PAIR = {"prompt": "tell me", "chosen": "a cat", "rejected": "a dog"}
CANDIDATE = {"prompt_id": "0", "prompt": "tell me", "finished": True, "length": 2, "logp": -1.0}


@pytest.fixture
def place(tiny: Path, tmp_path: Path) -> Path:
    """A folder with one bad thing of every kind."""

    def lines(name: str, *rows: object) -> None:
        (tmp_path / name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))

    lines("columns.jsonl", {"prompt": "a", "chosn": "b", "rejected": "c"})
    lines("empty.jsonl")
    lines("broken.jsonl", PAIR, '{"prompt": "tell')
    lines("pairs.jsonl", *({**PAIR, "prompt": f"tell me {i}"} for i in range(40)))
    lines("long.jsonl", {"prompt": "cat " * 70, "response": "dog"}, {"prompt": "a", "response": "b"})
    lines("prompts.jsonl", {"prompt": "tell me"}, {"prompt": "tell me about"})
    rows = [
        {
            **CANDIDATE,
            "prompt_id": str(p),
            "prompt": f"tell {p}",
            "sample": s,
            "response": "a " * (s + 1),
            "gold": float(s),
        }
        for p in range(3)
        for s in range(2)
    ]
    lines("candidates.jsonl", *rows)
    data.write([{**row, "gold": float("nan")} for row in rows], tmp_path / "nan.parquet")
    lines("a_file")
    (tmp_path / "nan.py").write_text("def score(prompts, responses):\n    return [float('nan')] * len(prompts)\n")
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "bare")
    RewardModel.load(tiny, head_seed=0).save(tmp_path / "rewards")
    return tmp_path


LABEL = "label --candidates {place}/candidates.jsonl --out {place}/run --gold "
REWARD = "reward --model {tiny} --data {place}/{} --out {place}/run"
GOOD_REWARD = REWARD.replace("{}", "pairs.jsonl")
BEST = "best_of_n --candidates {place}/candidates.jsonl --proxy {place}/rewards --out {place}/run"
BAD_INPUT = {
    "missing columns": (
        REWARD.replace("{}", "columns.jsonl"),
        ["columns.jsonl, line 1", "missing chosen", "chosn"],
    ),
    "empty file": (REWARD.replace("{}", "empty.jsonl"), ["empty.jsonl is empty"]),
    "no file": (REWARD.replace("{}", "nowhere.jsonl"), ["no file"]),
    "not JSON": (REWARD.replace("{}", "broken.jsonl"), ["broken.jsonl, line 2 is not JSON"]),
    "long prompt": (
        "sft --model {tiny} --data {place}/long.jsonl --out {place}/run --on-long error",
        ["71 tokens", "context of 64"],
    ),
    "long prompt to answer": (
        "generate --model {tiny} --prompts {place}/long.jsonl --out {place}/run --max-new-tokens 8 --on-long error",
        ["long.jsonl", "71 tokens", "leaves no room"],
    ),
    "unknown loss": (GOOD_REWARD + " --loss bradly_terry()", ["did you mean bradley_terry"]),
    "unknown loss option": (
        GOOD_REWARD + " --loss bradley_terry(centre=1)",
        ["did you mean center"],
    ),
    "unknown gold": (
        LABEL + "lenght()",
        ["did you mean length"],
    ),
    "unknown ensemble": (BEST + " --objectives wko()", ["did you mean wco"]),
    "unknown option": (BEST + " --objectve wco()", ["unknown option --objectve; did you mean 'objectives'?"]),
    "NaN scores": (BEST.replace("candidates.jsonl", "nan.parquet"), ["nan.parquet, row 1", "gold is nan"]),
    "NaN scorer": (
        LABEL + "{place}/nan.py:score()",
        ["scores must be finite"],
    ),
    "n larger than N": (BEST + " --n 1 2 3", ["n = 3 but the fewest finished answers to a prompt are 2"]),
    "no write permission": (REWARD.replace("{}", "pairs.jsonl").replace("/run", "/a_file/run"), ["cannot write there"]),
    "no tokenizer": (
        "generate --model {place}/bare --prompts {place}/prompts.jsonl --out {place}/run",
        ["holds no tokenizer", "save_pretrained"],
    ),
    "no model": ("generate --model {place}/none --prompts {place}/prompts.jsonl --out {place}/run", ["{place}/none"]),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_before_work(pyrite: Command, tiny: Path, place: Path, name: str) -> None:
    command, words = BAD_INPUT[name]
    before = sorted(place.rglob("*"))
    status, _, err = pyrite(*(part.format(tiny=tiny, place=place) for part in command.split()))
    assert status == 2, err
    assert err.count("\n") == 1, err
    assert all(word.format(place=place) in err for word in words), err
    assert sorted(p for p in place.rglob("*") if "__pycache__" not in p.parts) == before


def test_the_good_neighbors_of_bad_input_run(pyrite: Command, tiny: Path, place: Path) -> None:
    """So that none of the refusals above is about something else."""
    good = [REWARD.replace("{}", "pairs.jsonl").replace("/run", "/reward"), BEST + " --n 1 2"]
    good.append("label --candidates {place}/candidates.jsonl --gold length() --out {place}/label")
    good.append("generate --model {tiny} --prompts {place}/prompts.jsonl --out {place}/generate --max-new-tokens 8")
    for command in good:
        status, _, err = pyrite(*(part.format(tiny=tiny, place=place) for part in command.split()))
        assert status == 0, err
    assert Policy.load(tiny).packed
