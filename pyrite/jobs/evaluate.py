"""Evaluate a policy: gold reward, proxy reward and KL from the reference, always side by side.

Answers are sampled at temperature 1 without truncation and scored under the same distribution, so that
KL(policy || ref) = E_policy[log pi - log pi_ref] is estimated where it is defined. Natural logarithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrite import data, ensembles, estimators, golds, parts, runs, seeds, text
from pyrite.generate import Samples, sample
from pyrite.logps import Logps
from pyrite.models import Policy, RewardEnsemble, backbone
from pyrite.packing import Row, micro_batches
from pyrite.progress import Advance, progress, say
from pyrite.runs import Run

OUTPUTS = {"answers.parquet": "every answer with its gold, proxy and log-probabilities"}


@dataclass(frozen=True)
class Config:
    """Gold, proxy, KL, length and diversity of a policy."""

    model: str
    """Folder or Hub name of the policy."""
    prompts: str
    """Prompts: prompt, prompt_id."""
    out: Path
    gold: str | None = None
    """The scorer that plays the truth."""
    rewards: str | None = None
    """Folder of a reward run: the proxy."""
    ensemble: str = "mean()"
    """How its members become one score."""
    ref: str | None = None
    """Folder or Hub name of the reference policy for KL."""
    columns: str | None = None
    limit: int | None = None
    k: int = 1
    """Answers a prompt."""
    max_new_tokens: int = 256
    seed: int = 0


def inputs(config: Config) -> dict[str, str | Path]:
    """What the job reads."""
    named = {"model": config.model, "prompts": config.prompts, "ref": config.ref}
    return {name: path for name, path in named.items() if path} | (
        {"rewards": Path(config.rewards) / "done.json"} if config.rewards else {}
    )


def run(config: Config) -> Run:
    """Sample, score by everybody, summarize with standard errors over prompts."""
    run = runs.start("evaluate", config, inputs=inputs(config))
    if run.done:
        return run
    gold = parts.part(config.gold, golds) if config.gold else None
    combine = parts.part(config.ensemble, ensembles)
    combine(torch.zeros(2, 1))  # an option out of range is refused now, and so is a scorer that cannot score
    if gold:
        golds.check_scores(gold(["Say hi."], ["hello"]), 1, name=str(config.gold))
    rewards = RewardEnsemble.load(config.rewards) if config.rewards else None
    prompts = data.load(config.prompts, "prompts", columns=config.columns)[: config.limit]
    policy = Policy.load(config.model)
    ref = _reference(policy, config) if config.ref else None
    if policy.context <= config.max_new_tokens:
        raise ValueError(f"--max-new-tokens {config.max_new_tokens}: {config.model} reads {policy.context} at most")
    ids = text.encode_prompts(
        policy.tokenizer,
        [row["prompt"] for row in prompts],
        max_length=policy.context - config.max_new_tokens,
        where=lambda i: f"{config.prompts}: prompt {prompts[i]['prompt_id']}",
    )
    _sample(policy, prompts[:1], ids[:1], config, new=min(1, config.max_new_tokens))  # refuses options out of range
    run.open()
    say(f"evaluate: {config.k} answers to each of {len(prompts)} prompts")
    with progress("evaluate", len(prompts) * config.k, unit="answers") as advance:
        drawn = _sample(policy, prompts, ids, config, new=config.max_new_tokens, progress=advance)
    responses = [_tokens(drawn, i) for i in range(len(drawn.length))]
    answers = _answers(policy, prompts, drawn, responses)
    asked, said = [row["prompt"] for row in answers], [row["response"] for row in answers]
    values: dict[str, Tensor] = {}
    if gold:
        plain = [text.plain(prompt) for prompt in asked]
        values["gold"] = golds.check_scores(gold(plain, said), len(said), name=str(config.gold))
    if rewards:
        done = drawn.finished.tolist()  # an answer that was cut gets no end token
        values["proxy"] = combine(rewards.scores(asked, said, finished=done))
    if ref:
        values |= _kl(policy, ref, ids, drawn, responses)
    values |= {"length": drawn.length.double(), "missing_eos": (~drawn.finished).double()}
    if run.writes:
        rows = [{**row, **{k: v[i].item() for k, v in values.items()}} for i, row in enumerate(answers)]
        data.write(rows, run.folder / "answers.parquet")
    summary = {name: _summary(value, drawn.prompt, len(prompts)) for name, value in values.items()}
    diversity = {f"distinct_{n}": distinct(responses, n) for n in (1, 2)}
    run.log(step=0, **{name: pair["mean"] for name, pair in summary.items()}, **diversity)
    return run.finish(answers=len(answers), **summary, **diversity)


def distinct(responses: Sequence[Sequence[int]], n: int) -> float:
    """Share of different n-grams among all n-grams of the responses (Li et al. 2016, arXiv:1510.03055)."""
    grams = [tuple(r[i : i + n]) for r in responses for i in range(len(r) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


@torch.inference_mode()
def response_logps(policy: Policy, rows: Sequence[Row], *, budget: int = 16384) -> Logps:
    """Token by token log-probabilities of each row's one response."""
    policy.eval()
    flat: list[Tensor] = [torch.empty(0)] * len(rows)
    for group in micro_batches(rows, budget=budget):
        batch = policy.pack([rows[i] for i in group])
        for i, part in zip(group, policy(batch).split(batch.lengths.tolist()), strict=True):
            flat[i] = part.cpu()
    return Logps.from_tokens(flat)


def _reference(policy: Policy, config: Config) -> Policy:
    ref = Policy.load(str(config.ref))
    if ref.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ValueError(f"{config.ref} and {config.model} have other vocabularies: no KL between them")
    return ref


def _sample(
    policy: Policy,
    prompts: list[dict[str, Any]],
    ids: list[list[int]],
    config: Config,
    *,
    new: int,
    progress: Advance | None = None,
) -> Samples:
    drawn = sample(
        backbone(policy.model),
        ids,
        eos=text.end_id(policy.tokenizer),
        k=config.k,
        max_new_tokens=new,
        seed=seeds.derive(config.seed, "evaluate"),
        keys=[seeds.derive(0, str(row["prompt_id"])) for row in prompts],
        progress=progress,
    )
    return replace(drawn, **{name: value.cpu() for name, value in vars(drawn).items() if isinstance(value, Tensor)})


def _tokens(drawn: Samples, i: int) -> list[int]:
    return drawn.tokens[i, : int(drawn.length[i])].tolist()


def _answers(
    policy: Policy, prompts: list[dict[str, Any]], drawn: Samples, responses: list[list[int]]
) -> list[dict[str, Any]]:
    texts = text.decode(policy.tokenizer, responses)
    return [
        {
            "prompt_id": prompts[p]["prompt_id"],
            "prompt": prompts[p]["prompt"],
            "sample": s,
            "response": words,
            "finished": done,
        }
        for p, s, words, done in zip(
            drawn.prompt.tolist(), drawn.sample.tolist(), texts, drawn.finished.tolist(), strict=True
        )
    ]


def _kl(
    policy: Policy, ref: Policy, ids: list[list[int]], drawn: Samples, responses: list[list[int]]
) -> dict[str, Tensor]:
    """k1 and k3 of every answer: policy and reference score the very tokens that were sampled."""
    rows = [Row(ids[p], [r]) for p, r in zip(drawn.prompt.tolist(), responses, strict=True)]
    ours, theirs = response_logps(policy, rows), response_logps(ref, rows)
    return {f"kl_{name}": estimators.kl(ours, theirs, estimator=name).double() for name in ("k1", "k3")}


def _summary(values: Tensor, prompt: Tensor, prompts: int) -> dict[str, float]:
    """Mean and standard error over prompts (answers to one prompt are averaged first)."""
    total = torch.zeros(prompts, dtype=torch.float64).index_add(0, prompt, values.double())
    means = total / torch.bincount(prompt, minlength=prompts)
    error = means.std().item() / prompts**0.5 if prompts > 1 else 0.0
    return {"mean": means.mean().item(), "se": error}
