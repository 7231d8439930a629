"""What the command line says of itself: the commands, the options that a Config declares, names of others and of old.

Nothing here loads torch or a job.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import pkgutil
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pyrite import __version__
from pyrite.math.ranges import ConfigOption, declared, kinds, words

WIDTH = 100
KINDS = {  # what `pyrite list KIND` lists, and the module that holds it
    "annotators": "pyrite.training.live_rewards",
    "ensembles": "pyrite.math.ensembles",
    "golds": "pyrite.feedback.scorers",
    "jobs": "pyrite.jobs",
    "judges": "pyrite.feedback.judges",
    "losses": "pyrite.math.losses",
    "lr_schedulers": "pyrite.math.lr_schedulers",
    "optimizers": "pyrite.training.optimizers",
    "recipes": "pyrite.recipes",
    "reward_losses": "pyrite.math.reward_losses",
    "samplers": "pyrite.math.samplers",
    "schedules": "pyrite.feedback.schedules",
    "selectors": "pyrite.feedback.selection",
}
OLD_KINDS = {"discriminators": "annotators"}  # kinds of earlier versions, and what they are called now
USAGE = """\
pyrite {jobs}   run one job; --help lists its options
pyrite recipe {recipes}   run a whole experiment and write its report
pyrite list {kinds}   what can be named in an option
pyrite report DIR   write report.html for a run or a recipe, or for every run of a sweep
pyrite ledger show FILE | export FILE OUT.parquet [--pairs]   what was asked of golds, and what it cost
Every job takes --config FILE (YAML, or the config.json of a run; the command line wins), --dry-run, --json and --debug.
Several values for an option that takes one make a sweep: one run for each combination, in folders of their own below
--out. Results are JSON on standard output if that is no terminal; everything else goes to standard error."""
EXAMPLES = {
    "bandit": "--samplers uniform mix_r mix_p --out runs/bandit",
    "best_of_n": "--candidates runs/gold/candidates.parquet --proxy runs/reward --out runs/best_of_n",
    "dpo": "--model runs/sft/model --data pairs.jsonl --loss 'dpo(beta=0.1)' --out runs/dpo",
    "duel": "--answers a=runs/a/candidates.parquet b=runs/b/candidates.parquet --dimensions soups --out runs/duel",
    "evaluate": "--model runs/dpo/model --prompts prompts.jsonl --ref runs/sft/model --out runs/evaluate",
    "generate": "--model runs/sft/model --prompts prompts.jsonl --k 4 --out runs/candidates",
    "judge agreement": "--first runs/llm/verdicts.parquet --second runs/people/verdicts.parquet --out runs/agreement",
    "judge ask": "--model gpt-4o-mini --criterion 'Which answer is more helpful?' --pairs pairs.jsonl --out runs/judge",
    "judge export": "--criterion 'Which answer is more helpful?' --pairs pairs.jsonl --out runs/sheet",
    "judge import": "--file filled.csv --exported runs/sheet --out runs/people",
    "label": "--candidates runs/candidates/candidates.parquet --gold 'length()' --out runs/labels",
    "merge": "--model runs/dpo/model --out runs/merged",
    "online": "--model runs/sft/model --prompts prompts.jsonl --judge 'mine.py:judge()' --out runs/online",
    "pairs": "--candidates runs/candidates/candidates.parquet --dimensions soups --out runs/pairs",
    "ppo": "--model runs/sft/model --prompts prompts.jsonl --reward runs/reward --out runs/ppo",
    "reference": "--model runs/sft/model --data pairs.jsonl --out runs/reference",
    "reward": "--model runs/sft/model --data pairs.jsonl --members 5 --out runs/reward",
    "scratch": "--data pairs.jsonl --out runs/scratch",
    "sft": "--model path/or/hub-name --data demos.jsonl --out runs/sft",
    "soup": "--ingredients runs/a/model runs/b/model --out runs/soup",
    "winrate": "--data comparisons.jsonl --out runs/winrate",
}
COMMON = set(  # what --help shows, if the job has it; --help-all shows all
    """
    columns held_out limit seed loss ref gold judge rewards pairs noise members ensemble objectives advantage value
    steps rounds prompts_per_round prompts_per_step k n beta sampler gold_budget max_length max_prompt
    on_long max_new_tokens temperature eval_prompts lora lr epochs batch_size precision weights mode dimensions
    kinds candidates ties model second scale seeds samplers actions instances layers hidden vocabulary context
    annotator format estimate base_url options general tokens out
    """.split()
)
EVERYWHERE = (
    ("--config FILE", "Options from a YAML or JSON file, such as the config.json of a run; the command line wins."),
    (
        "--dry-run",
        "Check all that can be checked without work, show what would be read and written; write nothing.",
    ),
    ("--json", "Results as JSON on standard output, also on a terminal. Everything else goes to standard error."),
    ("--debug", "Show the whole traceback of an error."),
    ("--help", "The common options."),
    ("--help-all", "All options."),
)
# options as transformers and TRL call them
ALIASES = {
    "adam-beta1": "optim 'adamw(betas=(0.9, 0.98))'",
    "adam-beta2": "optim 'adamw(betas=(0.9, 0.98))'",
    "adapter": "model",
    "base-model": "model",
    "bf16": "precision bfloat16",
    "checkpoint": "model",
    "dataset": "data",
    "dataset-name": "data",
    "dataset-path": "data",
    "eval-dataset": "held-out",
    "eval-steps": "measure-every",
    "generation-kwargs": "temperature",
    "kl-coef": "beta",
    "learning-rate": "lr",
    "lora-r": "lora 'lora(r=16)'",
    "loss-type": "loss",
    "max-completion-length": "max-new-tokens",
    "max-prompt-length": "max-prompt",
    "max-seq-length": "max-length",
    "max-steps": "epochs",
    "min-lr-ratio": "lr-scheduler-type 'cosine(min_lr_ratio=0.1)'",
    "model-name": "model",
    "model-name-or-path": "model",
    "num-epochs": "epochs",
    "num-generations": "k",
    "num-ppo-epochs": "epochs",
    "num-return-sequences": "k",
    "num-train-epochs": "epochs",
    "output": "out",
    "output-dir": "out",
    "per-device-eval-batch-size": "batch-size",
    "per-device-train-batch-size": "batch-size",
    "random-seed": "seed",
    "ref-model": "ref",
    "ref-model-path": "ref",
    "response-length": "max-new-tokens",
    "reward-model": "reward",
    "reward-model-path": "reward",
    "sft-model-path": "model",
    "steps": "weights 0.25 0.75 (a soup is one model; write a loop for several)",
    "total-episodes": "steps",
    "train-batch-size": "batch-size",
    "train-file": "data",
    "use-peft": "lora 'lora(r=16)'",
    "warmup-steps": "lr-scheduler-type 'cosine(warmup_steps=10)'",
}


# Options of earlier versions: the name now ("--a or --b" if that depends on the job), or why it went and what to do.
OLD_NAMES: dict[str, str] = {
    "--budget": "--gold-budget",
    "--budget-scope": "each run has its own budget; give runs that share money a max_cost each",
    "--label-batch": "--gold-limits, as in --gold-limits 'limits(batch=8)'",
    "--label-cost": "--gold-limits, as in --gold-limits 'limits(cost=0.01)'",
    "--ledger": "--gold-limits, as in --gold-limits 'limits(ledger=\"gold.db\")'",
    "--max-cost": "--gold-limits, as in --gold-limits 'limits(cost=0.01, max_cost=5)'",
    "--betas": "--optim, as in --optim 'adamw(betas=(0.9, 0.98))'",
    "--clip": "--max-grad-norm",
    "--ensemble": "a proxy's score is the mean of its members; `pyrite evaluate --ensemble` takes others",
    "--floor": "--lr-scheduler-type, as in --lr-scheduler-type 'cosine(min_lr_ratio=0.1)'",
    "--log-every": "--logging-steps",
    "--rewards": "--proxy",
    "--lora-alpha": "--lora, as in --lora 'lora(r=16, alpha=32)'",
    "--lora-dropout": "--lora, as in --lora 'lora(r=16, dropout=0.1)'",
    "--lora-rank": "--lora, as in --lora 'lora(r=16)'",
    "--lora-targets": "--lora, as in --lora 'lora(r=16, target_modules=\"q_proj,v_proj\")'",
    "--micro-tokens": "--micro-batch-tokens",
    "--dropout": "only sft learns with it; adapters have their own, as in --lora 'lora(dropout=0.1)'",
    "--own-template": "name the model in --ref instead, which is then read in its own template",
    "--on-equal": "pairs whose answers are equal are always left out and counted",
    "--combinations": "--preferences, as in --preferences all",
    "--combine": "--preferences, as in --preferences all:P1A,P2A,P2B",
    "--eval-exact": "training measures sampled KL; `pyrite evaluate --ref` has the exact one",
    "--gamma": "--advantage, as in --advantage 'gae(gamma=1.0)'",
    "--gap": "--pairing, as in --pairing 'best_worst(min_margin=0.5)'",
    "--gold-batch": "--gold-limits, as in --gold-limits 'limits(batch=8)'",
    "--gold-cost": "--gold-limits, as in --gold-limits 'limits(cost=0.01)'",
    "--gold-every": "--gold-limits, as in --gold-limits 'limits(every=2)'",
    "--gold-ledger": "--gold-limits, as in --gold-limits 'limits(ledger=\"gold.db\")'",
    "--gold-max-cost": "--gold-limits, as in --gold-limits 'limits(cost=0.01, max_cost=5)'",
    "--gold-prompts": "--gold-limits, as in --gold-limits 'limits(prompts=64)'",
    "--keep-every": "give a run fewer --rounds, and --out another folder, to keep policies along the way",
    "--kl-control": "--kl, as in --kl 'k1(target=6.0)'",
    "--kl-horizon": "--kl, as in --kl 'k1(target=6.0, horizon=10000)'",
    "--kl-target": "--kl, as in --kl 'k1(target=6.0)'",
    "--label-schedule": '--annotator, as in --annotator \'reward(path="runs/reward", schedule="never()")\'',
    "--labels": "--pairing, as in --pairing 'best_worst(labels=\"hard\")'",
    "--lam": "--advantage, as in --advantage 'gae(lam=0.95)'",
    "--method": "--advantage, as in --advantage 'rloo()'",
    "--missing-eos": "--missing-eos-penalty",
    "--normalize": "--reward-scaling, as in --reward-scaling 'running()'",
    "--objective": "--ensemble",
    "--on-cut": "pairs of cut answers are kept in online, and left out in dpo if one answer only was cut",
    "--option-weights": "--combine-rewards, as in --combine-rewards P1A=0.5 P2B=0.25",
    "--patience": "--early-stopping-patience",
    "--ratio-clip": "--cliprange",
    "--recompute": "--gradient-checkpointing",
    "--ref-cache": "reference files are in references/ beside the run's folder",
    "--restart": "--reset-optimizer",
    "--reward-clip": "--reward-scaling, as in --reward-scaling 'fixed(clip=10.0)'",
    "--silver": "--annotator",
    "--stop-kl": "lower --lr or --epochs, or raise --beta",
    "--stop-when-parted": "--early-stopping-patience, as in --early-stopping-patience 2",
    "--tokenizer": "an estimate takes a token to be four characters",
    "--tokens": "log-probabilities of tokens are always stored",
    "--top-k": "answers to learn from are drawn from the whole distribution",
    "--top-p": "answers to learn from are drawn from the whole distribution",
    "--train-top": "--lora, as in --lora 'lora(r=16)'",
    "--value-clip": "--value, as in --value 'shared(clip=0.2)'",
    "--value-lora-rank": '--value, as in --value \'model(path="runs/reward/member_0", lora="lora(r=16)")\'',
    "--value-lr": "--value, as in --value 'model(path=\"runs/reward/member_0\", lr=1e-5)'",
    "--value-top": '--value, as in --value \'model(path="runs/reward/member_0", lora="lora(r=16)")\'',
    "--value-weight": "--value, as in --value 'shared(weight=0.1)'",
    "--whiten": "--advantage, as in --advantage 'gae(whiten=False)'",
    "--save-every": "--save-steps",
    "--schedule": "--lr-scheduler-type, as in --lr-scheduler-type 'linear(warmup_steps=10)'",
    "--standardize": "scores are always standardized on the candidates",
    "--warmup": "--lr-scheduler-type, as in --lr-scheduler-type 'cosine(warmup_steps=10)'",
    "--weight-decay": "--optim, as in --optim 'adamw(weight_decay=0.01)'",
}


ONLY_WITH = {"--tokenizer": "estimate"}  # options of earlier versions that only jobs with this other one had
OLD_COMMANDS = {
    "reference compute": "`pyrite reference` alone computes",
    "reference import": "put the sums into columns of the data, and use --ref column",
    "reference verify": "`pyrite dpo --ref FOLDER` checks, before it learns anything, that files are unchanged and "
    "that every answer is there, as the policy's tokens; it computes rows again only if they are the policy's own",
}


def overview(arguments: list[str]) -> str | None:
    """The answer to a command that needs no job: help, version, what jobs and recipes there are. None for another."""
    match arguments:
        case [] | ["-h" | "--help" | "help", *_]:
            return USAGE.format(jobs="|".join(names("jobs")), recipes="|".join(names("recipes")), kinds="|".join(KINDS))
        case ["-V" | "--version" | "version", *_]:
            return f"pyrite {__version__}"
        case ["list", "jobs" | "recipes" as kind]:
            return "\n".join(f"{name:18} {_summary(f'pyrite.{kind}.{name}')}" for name in names(kind))
    return None


def names(kind: str) -> list[str]:
    """The jobs, or the recipes."""
    package = importlib.import_module(KINDS[kind])
    return sorted(getattr(package, "NAMES", None) or (module.name for module in pkgutil.iter_modules(package.__path__)))


def _summary(module: str) -> str:
    """The first line of a module's docstring, read without importing it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return (ast.get_docstring(ast.parse(Path(spec.origin).read_bytes())) or "").partition("\n")[0]


def help_text(schema: type, prog: str, *, everything: bool) -> str:
    """The help of a job or recipe: what it does, required and common options, or all of them, and an example."""
    known = list(declared(schema))
    needed = [one for one in known if one.required]
    others = [one for one in known if not one.required]
    common = [one for one in others if one.name in COMMON]
    usage = " ".join([prog, *(f"{one.typed} {_metavar(one)}" for one in needed), "[options]"])
    lines = [f"usage: {usage}", "", (schema.__doc__ or "").split("\n\n")[0].strip(), ""]
    lines += _section("required", needed)
    if everything:
        groups = dict.fromkeys(one.group for one in others)
        for group in groups:
            lines += _section(group.replace("_", " ") or "options", [one for one in others if one.group == group])
    else:
        lines += _section("common options", common)
    lines += ["everywhere"] + [line for name, text in EVERYWHERE for line in _entry(name, text)] + [""]
    name = prog.removeprefix("pyrite ")
    example = EXAMPLES.get(name, "--out runs/" + name.split()[-1])
    lines += ["example", f"  {prog} {example}"]
    if not everything and (more := len(others) - len(common)):
        lines += ["", f"{prog} --help-all shows {more} more options."]
    return "\n".join(lines)


def unknown(name: str, known: Iterable[str], shown: str) -> str:
    """What to say of an option that is not known: what became of it, or which one is meant."""
    names = [_dashed(one) for one in known]
    beside = ONLY_WITH.get(f"--{_dashed(name)}")
    if is_old(name) and (beside is None or beside in names):
        old = f"--{_dashed(name)}" if f"--{_dashed(name)}" in OLD_NAMES else f"--{_dashed(name.removeprefix('no_'))}"
        now = OLD_NAMES[old]
        if not now.startswith("--"):
            return f"{old} is gone: {now}"
        if here := [new for new in now.split(" or ") if new.removeprefix("--").split()[0].strip(",") in names]:
            return f"{old} is now {' or '.join(here)}"
        if not difflib.get_close_matches(_dashed(name), names, n=1, cutoff=0.85):
            return f"unknown option {shown}; other jobs have {now} in its place"
    elsewhere = difflib.get_close_matches(_dashed(name), ALIASES, n=1, cutoff=0.85)
    if elsewhere and ALIASES[elsewhere[0]].split()[0] in names:
        return f"unknown option {shown}; did you mean --{ALIASES[elsewhere[0]]}?"
    return f"unknown option {shown}{did_you_mean(_dashed(name), names)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'sft'?", or nothing if no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def is_old(name: str) -> bool:
    """Whether an option of this name was there in an earlier version."""
    return bool({f"--{_dashed(name)}", f"--{_dashed(name.removeprefix('no_'))}"} & set(OLD_NAMES))


def _section(title: str, some: Iterable[ConfigOption]) -> list[str]:
    lines = [line for one in some for line in _entry(f"{one.typed} {_metavar(one)}", _told(one))]
    return [title, *lines, ""] if lines else []


def _entry(head: str, text: str) -> list[str]:
    indent = " " * 30
    wrapped = textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    if len(head) < 27 and wrapped:
        return [f"  {head:28}{wrapped[0].strip()}", *wrapped[1:]]
    return [f"  {head}", *wrapped]


def _told(one: ConfigOption) -> str:
    text, span = " ".join(one.text.split()), words(one.hint)
    if span and get_origin(one.hint) is not Literal and span not in text:
        text += f" {span[0].upper()}{span[1:]}."
    if one.required:
        return f"{text} (required)"
    if one.default is None or one.default in ("", ()):
        return text
    return f"{text} Default: {_value(one.default)}."


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (tuple, list)):
        return " ".join(map(_value, value))
    return f'"{value}"' if isinstance(value, str) and " " in value else str(value)


def _metavar(one: ConfigOption) -> str:
    """What an option takes: a number, a choice, several."""
    plain = [kind for kind in kinds(one.hint) if kind is not type(None)]
    if bool in plain:
        return f"| --no-{_dashed(one.name)}"
    names = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
    inner = [part for kind in plain for part in (get_args(kind) if get_origin(kind) is tuple else (kind,))]
    told = dict.fromkeys(
        "|".join(map(str, get_args(kind))) if get_origin(kind) is Literal else names.get(kind, "TEXT")
        for part in inner
        if part is not ...
        for kind in kinds(part)
    )
    return "|".join(told) + (" ..." if one.several else "")


def _dashed(name: str) -> str:
    return name.replace("_", "-")
