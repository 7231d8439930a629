"""Evaluate a policy: gold reward, proxy reward and KL from the reference, always side by side.

Answers are sampled at temperature 1 without truncation and scored under the same distribution, so that
KL(policy || ref) = E_policy[log pi - log pi_ref] is estimated where it is defined: by k1 and k3, and by the exact KL
of every position summed up; beside it the policy's exact entropy. With preference pairs, also what training did to the
ranking of their answers and to single tokens. Natural logarithms.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pyrite.core import runs
from pyrite.core.processes import progress, say
from pyrite.core.runs import Run
from pyrite.data import rows, text
from pyrite.data.rows import OnLong
from pyrite.data.text import Template
from pyrite.math import statistics
from pyrite.math.logps import PairLogps
from pyrite.math.ranges import Count, Natural
from pyrite.math.statistics import TokenRatios
from pyrite.models.forward import token_logps
from pyrite.models.policy import Policy
from pyrite.training.evaluation import Evaluation, Evaluator, Measurement
from pyrite.training.pairs import Preferences, encode_pairs

OUTPUTS = {
    "answers.parquet": "every answer with its gold, proxy and log-probabilities",
    "analyses.json": "degeneration, KL by position, and the analyses of the pairs",
    "tokens.csv": "with pairs: how far training moved each token, on average",
    "alpaca_eval.json": "with --alpaca-eval NAME: one answer a prompt as AlpacaEval reads it",
}
RANKED = ("accuracy", "policy_accuracy", "margin")  # analyses of the pairs that are results too


@dataclass(frozen=True)
class Config:
    """Gold, proxy, KL, length and diversity of a policy."""

    model: str
    """Folder or Hub name of the policy."""
    prompts: str
    """Prompts: prompt, prompt_id."""
    out: Path
    """Folder of the run, new or empty."""
    gold: str | None = None
    """Gold scorer, the reward that counts as true."""
    proxy: str | None = None
    """Proxy: the folder of a reward run."""
    ensemble: str = "mean()"
    """How to combine the scores of its members."""
    ref: str | None = None
    """Folder or Hub name of the reference policy for the KL."""
    pairs: str | None = None
    """Preference pairs for analyses against the reference: rankings, tokens moved most, end tokens."""
    on_contradiction: rows.OnContradiction = "error"
    """What to do with a pair whose strength is below 0, or probability below one half, so that its rejected answer is
    the better one: stop, exchange the answers, leave it out, or take it as it stands, as a label that was drawn."""
    alpaca_eval: str | None = None
    """Also write the first answer to each prompt in AlpacaEval's format, under this generator name."""
    min_count: Count = 100
    """Least number of occurrences for a token to be listed among those moved most."""
    columns: str | None = None
    """Column names that differ, as ours=theirs: "prompt=question,response=answer"."""
    limit: Count | None = None
    """Use only the first N prompts."""
    k: Count = 1
    """Answers per prompt."""
    max_prompt: Count | None = None
    """Longest prompt in tokens; what --max-new-tokens leaves of the model's context by default."""
    on_long: OnLong | None = None
    """What to do with a longer prompt: cut it to its end, leave its row out, or stop. By default it is cut, unless all
    prompts are too long."""
    max_new_tokens: Count = 256
    """Longest answer in tokens."""
    template: Template = Template()
    seed: Natural = 0
    """Random seed."""


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    named = {"model": config.model, "prompts": config.prompts, "ref": config.ref, "pairs": config.pairs}
    return {name: path for name, path in {**named, "proxy": config.proxy}.items() if path}


def run(config: Config) -> Run:
    """Sample, score by everybody, summarize with standard errors over prompts; analyze the pairs."""
    run = runs.start("evaluate", config, inputs=inputs)
    if run.done:
        return run
    pairs = _pairs(config)
    policy = Policy.load(config.model, template=config.template)
    evaluator = Evaluator.load(
        _options(config),
        policy,
        ref=config.ref,
        seed=config.seed,
        columns=config.columns,
        ensemble=config.ensemble,
        exact=config.ref is not None,
        max_prompt=config.max_prompt,
        on_long=config.on_long,
    )
    made = _encoded(policy, pairs, config)
    run.open()
    say(f"evaluate: {config.k} answers to each of {len(evaluator.prompts)} prompts")
    with progress("evaluate", evaluator.total, unit="answers") as advance:
        answers = evaluator(policy, progress=advance)
    found: dict[str, Any] = {"answers": _by_position(answers)}
    tokens = answers.responses.tokens()
    state = statistics.degeneration(tokens, answers.responses.finished.tolist())
    found["answers"] |= state._asdict()
    if evaluator.ref and made:
        found["pairs"], table = on_pairs(policy, evaluator.ref, made, min_count=config.min_count)
        if run.writes:
            runs.write_text(run.folder / "tokens.csv", _csv(_named(table, policy.tokenizer)))
    if run.writes:
        rows.write(_rows(answers), run.folder / "answers.parquet")
        runs.write_json(run.folder / "analyses.json", found)
        if config.alpaca_eval:
            runs.write_json(run.folder / "alpaca_eval.json", _for_alpaca_eval(answers, config))
    summary = answers.summary()
    worth = {f"distinct_{n}": statistics.distinct(tokens, n) for n in (1, 2)} | {
        "repetition": state.repetition,
        "degenerate": state.degenerate,
    }
    run.log(step=0, **{name: pair["mean"] for name, pair in summary.items()}, **worth)
    ranked = {name: value for name, value in found.get("pairs", {}).items() if name in RANKED}
    return run.finish(answers=len(tokens), **summary, **worth, **ranked, **evaluator.long)


def _for_alpaca_eval(answers: Measurement, config: Config) -> list[dict[str, str]]:
    """instruction, output, generator, dataset: the leaderboard's columns."""
    named = {"generator": str(config.alpaca_eval), "dataset": Path(config.prompts).stem}
    read = answers.responses
    every = zip(read.sample, read.prompts, read.texts, strict=True)
    return [{"instruction": text.plain(asked), "output": said, **named} for number, asked, said in every if not number]


def on_pairs(
    policy: Policy, ref: Policy, made: Preferences, *, min_count: int = 100, k: int = 10
) -> tuple[dict[str, Any], TokenRatios]:
    """Every analysis of B encoded pairs, as JSON values, and the table of all tokens."""
    read = made.responses
    assert read.truncated is not None  # they have been encoded
    with progress("evaluate pairs", 2 * len(read), unit="answers") as advance:
        ours, theirs = (token_logps(model, read, made.groups, progress=advance) for model in (policy, ref))
    sides = [(logps.at(made.chosen), logps.at(made.rejected)) for logps in (ours, theirs)]
    pair, at_ref = PairLogps(*sides[0], *sides[1]), PairLogps(*sides[1])
    finished = ~(read.truncated[made.chosen] | read.truncated[made.rejected])
    ratios = statistics.log_ratios(ours, theirs)
    prompts = torch.tensor(rows.clusters(made.pairs))
    table = statistics.by_token(read.ids, ratios)
    down, up = statistics.extremes(table, k=k, at_least=min_count)
    found = {
        "pairs": len(made),
        "dropped": len(made.dropped),
        **_plain(statistics.ranking(pair, prompts)),
        "end_token": _plain(statistics.ends(pair, finished, prompts)),
        "end_token_ref": _plain(statistics.ends(at_ref, finished, prompts)),
        "tokens": len(ratios),
        "ratio": statistics.mean(ratios, prompts.repeat_interleave(2).repeat_interleave(read.lengths))._asdict(),
        "tail_mass": statistics.tail_mass(ratios),
        "histogram": statistics.histogram(table.mean)._asdict(),
        "down": _named(down, policy.tokenizer),
        "up": _named(up, policy.tokenizer),
    }
    return found, table


def _options(config: Config) -> Evaluation:
    return Evaluation(
        eval_prompts=config.prompts,
        gold=config.gold,
        proxy=config.proxy,
        eval_limit=config.limit,
        eval_k=config.k,
        max_new_tokens=config.max_new_tokens,
    )


def _pairs(config: Config) -> list[dict[str, Any]]:
    if config.pairs and not config.ref:
        raise ValueError("--pairs compares the policy with its reference on pairs: give --ref too")
    if not config.pairs:
        return []
    how: dict[str, Any] = {"on_contradiction": config.on_contradiction, "on_tie": "drop", "note": say}
    return rows.load(config.pairs, "pairs", **how)


def _encoded(policy: Policy, pairs: list[dict[str, Any]], config: Config) -> Preferences | None:
    if not pairs:
        return None
    fitted = rows.fit(
        policy.tokenizer,
        pairs,
        most=policy.context * 3 // 4,
        context=policy.context,
        on_long=config.on_long or "truncate",
        note=lambda words: say(f"evaluate --pairs: {words}"),
    )
    made = encode_pairs(policy.tokenizer, fitted.rows, max_length=policy.context, source=str(config.pairs))
    made = replace(made, dropped=fitted.dropped + made.dropped)
    if not len(made):
        reason = made.dropped[0]["reason"]
        raise ValueError(f"{config.pairs}: none of {len(pairs)} pairs can be scored, the first because {reason}")
    return made


def _by_position(answers: Measurement) -> dict[str, Any]:
    """The exact KL at each position, over the answers that reach it; {} without a reference."""
    if answers.exact is None:
        return {}
    nats, reached = statistics.by_position(answers.exact.kl)
    return {"kl_by_position": nats.tolist(), "answers_by_position": reached.tolist()}


def _rows(answers: Measurement) -> list[dict[str, Any]]:
    read = answers.responses
    columns = {
        "prompt_id": [row["prompt_id"] for row in read.owners],
        "prompt": read.prompts,
        "sample": read.sample,
        "response": read.texts,
        "finished": read.finished.tolist(),
        **{name: value.tolist() for name, value in answers.values.items()},
        "repetition": [statistics.repetition(tokens) for tokens in read.tokens()],
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _plain(means: dict[str, statistics.Mean]) -> dict[str, dict[str, float]]:
    return {name: value._asdict() for name, value in means.items()}


def _named(table: TokenRatios, tokenizer: Any) -> list[dict[str, Any]]:
    """A row a token, the one moved down most first."""
    texts = tokenizer.convert_ids_to_tokens(table.token.tolist())
    columns = zip(table.token.tolist(), texts, table.count.tolist(), table.mean.tolist(), strict=True)
    return [{"token": t, "text": text, "count": count, "ratio": ratio} for t, text, count, ratio in columns]


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["token", "text", "count", "ratio"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: row["ratio"]))
    return text.getvalue()
