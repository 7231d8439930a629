"""Which reference, and how strongly: the three questions of RefDPO on a toy world (arXiv:2407.13709).

One policy for every reference and beta: its own, none (posterior), the prior (likelihood), a stronger model of the
same family, one of another family, one with another tokenizer. Gold, KL, length and degeneration side by side.

Source: Liu, Liu, Cohan 2024, "Understanding Reference Policies in Direct Preference Optimization". Their win rates
against GPT-4 become the exact gold reward here. The best beta of a reference is found on one half of the prompts and
measured on the other, so that looking for it does not create it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pyrite.data import rows as data
from pyrite.jobs import dpo, evaluate, generate, label, scratch, sft
from pyrite.math import statistics
from pyrite.math.seeds import derive
from pyrite.models.references import load
from pyrite.recipes import study, toy
from pyrite.recipes.study import Chain, Claim, Row
from pyrite.recipes.toy import Shares
from pyrite.report.charts import BLUE, BRASS, GREEN, ORANGE, PURPLE, Axis, Chart, curves
from pyrite.report.page import Part, figure, number, numbers, percent, table, text
from pyrite.training.evaluation import Evaluation
from pyrite.training.loop import Training
from pyrite.training.pairs import paired_texts


@dataclass(frozen=True)
class ReferencesSettings:
    """One chain: a policy, preference pairs, stronger models, and direct optimization against each reference."""

    gold: str = "pyrite.toy:story_quality()"
    """The scorer that plays the truth, in labels and in evaluation."""
    toy_demos: int = 24_000
    better_demos: int = 8_000
    """Demonstrations of the stronger models, in a better style."""
    better: Shares = Shares(drift=0.0, opening=0.9, closing=0.3, vivid=0.6, technical=0.0)
    sft: Training = toy.SFT
    stronger: Training = replace(toy.SFT, lr=2e-3)
    """How models are trained on the better demonstrations."""
    vocabulary: int = 700
    """Tokens of the other tokenizer, which splits words."""
    pair_prompts: int = 400
    pair_answers: int = 6
    dpo: Training = Training(
        lr=1e-3, epochs=4, batch_size=32, micro_batch_tokens=1 << 16, lr_scheduler_type="linear(min_lr_ratio=0.0)"
    )
    measure_every: int = 40
    """Steps between measurements, from which the best checkpoint is chosen."""
    betas: tuple[float, ...] = (1.0, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
    """Of the policy's own reference; the last ones are meant to degenerate."""
    other_betas: tuple[float, ...] = (1.0, 0.1, 0.01, 0.003, 0.001)
    """Of every other reference."""
    answer_prompts: int = 128
    answers: int = 2
    max_new_tokens: int = 64


SETTINGS = {"toy": ReferencesSettings()}
OWN, STRONG = ("self", "none", "prior"), ("family", "stranger", "tokenizer")


def policies(settings: ReferencesSettings) -> Iterator[tuple[str, float]]:
    """Reference and beta of every policy."""
    for ref in (*OWN, *STRONG):
        for beta in settings.betas if ref == "self" else settings.other_betas:
            yield ref, beta


def chain(one: Chain, settings: ReferencesSettings) -> None:
    """Run every stage of a chain."""
    world = toy.write(
        one.path("world"), seed=derive(one.seed, "world"), n_pool=settings.answer_prompts, n_demos=settings.toy_demos
    )
    policy, held_out = one.path("sft", "model"), str(world.pool_prompts)
    pairs, held_out_pairs = (one.path("pairs", f"{name}.parquet") for name in ("pairs", "held_out"))
    better = one.path("better", "demos.parquet")
    if not Path(better).exists():
        asked = [row["prompt"] for row in data.load(world.pair_prompts, "prompts")]
        seed = derive(one.seed, "better")
        data.write(toy.demos(settings.better_demos, seed=seed, among=asked, shares=settings.better), better)

    def evaluated(name: str, folder: str, *, ref: bool = True) -> None:
        """Answers to the held-out prompts; with the start as reference if the vocabulary is the same."""
        config = evaluate.Config(
            model=one.path(folder, "model"),
            prompts=held_out,
            gold=settings.gold,
            ref=policy if ref else None,
            pairs=held_out_pairs if ref else None,
            k=settings.answers,
            max_new_tokens=settings.max_new_tokens,
            out=Path(f"evaluate_{folder}"),
        )
        one.run(f"evaluate: {name}", config, "evaluate")

    one.run("sft", sft.Config(str(world.model), str(world.demos), Path("sft"), training=settings.sft))
    drawn = generate.Config(
        model=policy,
        prompts=str(world.pair_prompts),
        k=settings.pair_answers,
        limit=settings.pair_prompts,
        max_new_tokens=settings.max_new_tokens,
        out=Path("answers"),
    )
    one.run("answers", drawn, "pairs")
    candidates = one.path("answers", "candidates.parquet")
    one.run("pairs", label.Config(candidates, Path("pairs"), gold=settings.gold), "labels")
    # stronger models: one that comes from the policy, one that does not, one with another tokenizer
    toy.model(derive(one.seed, "larger"), size="base").save_pretrained(one.path("larger"))
    toy.tokenizer().save_pretrained(one.path("larger"))
    words = scratch.Config(better, Path("words"), kind="demos", vocabulary=settings.vocabulary, context=256)
    one.run("tokenizer", words)
    starts = {"family": policy, "stranger": one.path("larger"), "tokenizer": one.path("words", "model")}
    for name, start in starts.items():
        one.run(f"stronger: {name}", sft.Config(start, better, Path(name), training=settings.stronger))
        evaluated(name, name, ref=False)
    evaluated("start", "sft")
    for ref, beta in policies(settings):
        config = dpo.Config(
            model=policy,
            data=pairs,
            held_out=held_out_pairs,
            loss=f"dpo(beta={beta:g})",
            ref=ref if ref in OWN else one.path(ref, "model"),
            training=settings.dpo,
            measure_every=settings.measure_every,
            evaluation=Evaluation(
                eval_prompts=held_out, gold=settings.gold, eval_limit=None, max_new_tokens=settings.max_new_tokens
            ),
            out=Path(f"{ref}_beta_{beta:g}"),
        )
        one.run(f"dpo: {ref} {beta:g}", config, "dpo")
        evaluated(f"{ref} {beta:g}", f"{ref}_beta_{beta:g}")


# what is measured

NUMBERS = ("gold", "kl", "length", "missing_eos", "repetition", "accuracy", "policy_accuracy", "best_gold")


def collect(chains: Sequence[Chain], settings: ReferencesSettings) -> Row:
    """Everything the page shows."""
    trained = [_policy(chain, ref, beta) for chain in chains for ref, beta in policies(settings)]
    starts = [{"model": name, **_evaluated(chain, name)} for chain in chains for name in ("start", *STRONG)]
    shown = ["start", *(f"{ref} {beta:g}" for ref, beta in policies(settings) if ref == "self" or beta == 0.1)]
    return {
        "policies": trained,
        "curves": _over_chains(trained, "ref", "beta"),
        "starts": _over_chains(starts, "model"),
        "indicators": indicators(chains),
        "claims": check([measure(chain, settings) for chain in chains]),
        "samples": study.first_answers(
            {name: chains[0].runs[f"evaluate: {name}"] for name in shown}, ("gold", "length"), prompts=3
        ),
    }


def _over_chains(rows: Sequence[Row], *by: str) -> list[Row]:
    """Means over chains, and how many of them degenerated."""
    groups = study.grouped(rows, *by).values()
    means = zip(study.over_chains(rows, by, NUMBERS), groups, strict=True)
    return [{**mean, "degenerate": sum(row["degenerate"] for row in some)} for mean, some in means]


def _policy(chain: Chain, ref: str, beta: float) -> Row:
    """One policy's numbers, side by side: at the last step, and at the best checkpoint."""
    done = chain.results(f"dpo: {ref} {beta:g}")
    last, best = done["last"], done["best"]
    row = {"seed": chain.seed, "ref": ref, "beta": beta, **_evaluated(chain, f"{ref} {beta:g}")}
    row |= {name: last.get(name) for name in ("accuracy", "policy_accuracy", "loss")}
    return row | {"best_step": best["step"], "last_step": last["step"], "best_gold": best["gold"]}


def _evaluated(chain: Chain, name: str) -> Row:
    found = chain.results(f"evaluate: {name}")
    row = {name: found[name]["mean"] for name in ("gold", "length", "missing_eos")}
    row["kl"] = found["kl_k1"]["mean"] if "kl_k1" in found else None
    return row | {"repetition": found["repetition"], "degenerate": found["degenerate"]}


def indicators(chains: Sequence[Chain]) -> list[Row]:
    """How each reference looks at the training pairs, before anything is trained; means over chains.

    sd: of its margins log pi_ref(chosen) - log pi_ref(rejected), nats: what beta multiplies. correlation: of its
    margins with the policy's own. accuracy: how often it ranks chosen first.
    """
    rows = []
    for chain in chains:
        margins = _margins(chain)
        for ref in (ref for ref in (*OWN, *STRONG) if ref in margins):
            both = torch.stack([margins[ref], margins["self"]])
            accuracy = statistics.wins(margins[ref], torch.zeros_like(margins[ref])).mean().item()
            correlation = torch.corrcoef(both)[0, 1].item()
            rows.append({"ref": ref, "sd": both[0].std().item(), "correlation": correlation, "accuracy": accuracy})
    return study.over_chains(rows, ("ref",), ("sd", "correlation", "accuracy"))


def _margins(chain: Chain) -> dict[str, Tensor]:
    """Margins (B,) of the training pairs under every stored reference of a chain."""
    pairs = data.load(chain.folder / "pairs" / "pairs.parquet", "pairs")
    said = paired_texts(pairs)
    margins: dict[str, Tensor] = {}
    for manifest in sorted((chain.folder / "references").glob("*/manifest.json")):
        table = load(manifest.parent, tokens=False)
        kind, scorer = table.recipe["conditioning"]["kind"], Path(table.manifest["scorer"]["name"]).parent.name
        sums = torch.from_numpy(table.sum_logp[table.rows(said)])
        margins["prior" if kind == "prior" else "self" if scorer == "sft" else scorer] = sums[::2] - sums[1::2]
    return margins


# claims

SOURCE = "arXiv:2407.13709"
Values = Mapping[tuple[str, str], Tensor]  # (gold or length, reference) -> (M, Q) by beta and prompt


@dataclass(frozen=True)
class BetaCurves:
    """One chain: betas of each reference, falling; curves of gold and length over them; the policies' accuracy (M,)."""

    betas: Mapping[str, Sequence[float]]
    values: Values
    accuracy: Mapping[str, Sequence[float]]
    curves: study.Curves

    def best(self, ref: str, of: str = "gold") -> Tensor:
        """Gold (or length) of the beta with most gold on the other half, (B,)."""
        return self.curves.at_peak(("gold", ref), (of, ref)).mean(1)

    def at(self, ref: str, beta: float) -> Tensor:
        """Gold at one beta, (B,)."""
        return self.curves.own["gold", ref][:, :, self.betas[ref].index(beta)].mean(1)

    def best_beta(self, ref: str) -> Tensor:
        """log10 of the beta with most gold over all prompts, (B,)."""
        chosen = self.curves.own["gold", ref].mean(1).argmax(-1)
        return torch.tensor(self.betas[ref], dtype=torch.float64).log10()[chosen]


def measure(chain: Chain, settings: ReferencesSettings) -> BetaCurves:
    """What the claims read of a chain."""
    betas: dict[str, list[float]] = {}
    accuracy: dict[str, list[float]] = {}
    grids: dict[tuple[str, str], list[Tensor]] = {}
    for ref, beta in policies(settings):
        betas.setdefault(ref, []).append(beta)
        accuracy.setdefault(ref, []).append(chain.results(f"dpo: {ref} {beta:g}")["last"]["policy_accuracy"])
        for name, grid in study.by_prompt(chain.runs[f"evaluate: {ref} {beta:g}"], ("gold", "length")).items():
            grids.setdefault((name, ref), []).append(grid.mean(1))
    values = {key: torch.stack(rows) for key, rows in grids.items()}
    return BetaCurves(betas, values, accuracy, study.halves(values))


def _accuracy_rises(chain: BetaCurves) -> float:
    """Policy accuracy at the smallest beta less that at 0.1."""
    accuracy = chain.accuracy["self"]
    return accuracy[-1] - accuracy[chain.betas["self"].index(0.1)]


CLAIMED = """
smaller-beta | table 1 | With its own SFT reference, a beta below the usual 0.1 brings more gold
collapse | table 1 | Lowered further, beta loses that gold again
policy-accuracy | table 2 | The policy itself ranks held-out pairs better at the smallest beta than at 0.1
reference-helps | table 3 | DPO with its reference brings more gold than without one (posterior), each at its best beta
posterior-is-long | table 3 | Without a reference answers are longer (tokens), each at its best beta
reference-beats-prior | table 3 | DPO with its reference brings more gold than with the unconditional prior (likelihood)
stronger-helps | table 4 | A stronger reference of the same family brings more gold than the policy's own
stronger-wants-more | table 4 | A stronger reference of the same family wants a larger beta than the policy's own
    (decades)
compatible | table 5 | A stronger reference helps more where it comes from the same family than where it does not
other-tokenizer | table 5 | A stronger reference may have another tokenizer: it still brings more gold than the policy's
    own
"""
MEASURED: dict[str, Callable[[BetaCurves], Tensor | float]] = {
    "smaller-beta": lambda m: m.best("self") - m.at("self", 0.1),
    "collapse": lambda m: m.best("self") - m.at("self", m.betas["self"][-1]),
    "policy-accuracy": _accuracy_rises,
    "reference-helps": lambda m: m.best("self") - m.best("none"),
    "posterior-is-long": lambda m: m.best("none", "length") - m.best("self", "length"),
    "reference-beats-prior": lambda m: m.best("self") - m.best("prior"),
    "stronger-helps": lambda m: m.best("family") - m.best("self"),
    "stronger-wants-more": lambda m: m.best_beta("family") - m.best_beta("self"),
    "compatible": lambda m: m.best("family") - m.best("stranger"),
    "other-tokenizer": lambda m: m.best("tokenizer") - m.best("self"),
}
CLAIMS = study.claims(SOURCE, CLAIMED, MEASURED)


def check(chains: Sequence[BetaCurves]) -> list[Row]:
    """Every claim; the interval of one chain is over prompts, drawn again within each half."""
    drawn = replace(chains[0], curves=study.halves(chains[0].values, resamples=2000)) if len(chains) == 1 else None

    def alone(claim: Claim, _: BetaCurves) -> tuple[float, float] | None:
        return None if claim.value is _accuracy_rises else study.bootstrap(claim, drawn)

    return study.check(CLAIMS, chains, alone=alone)


# the page

NAMES = {
    "self": "own reference",
    "none": "none (posterior)",
    "prior": "prior (likelihood)",
    "family": "stronger, same family",
    "stranger": "stronger, other family",
    "tokenizer": "stronger, other tokenizer",
}
COLORS = {"self": BLUE, "none": ORANGE, "prior": PURPLE, "family": GREEN, "stranger": BRASS, "tokenizer": "#444b54"}
TITLES = {
    "gold": "gold reward",
    "kl": "KL from the start, nats",
    "length": "length, tokens",
    "policy_accuracy": "policy ranks pairs right",
    "accuracy": "reward ranks pairs right",
}
DOTS = "A dot marks a degenerate policy: more than 20 % of its answers never end, or half of its 4-grams repeat."


def against_beta(results: Row, y: str, refs: Sequence[str], *, height: int = 260) -> Chart:
    """One number against beta, a line for each reference; the dashed line is where the policy started."""
    start = results["starts"][0] | {"kl": 0.0}
    rows = [row for row in results["curves"] if row["ref"] in refs]
    return curves(
        sorted(rows, key=lambda row: (refs.index(row["ref"]), row["beta"])),
        Axis("beta", "β, strength of the reference (log scale)", format="~g", log=True, base=10),
        Axis(y, TITLES[y]),
        by="ref",
        names=NAMES,
        colors=COLORS,
        tooltip={"degenerate": "degenerate chains"},
        dot=lambda row: row["degenerate"] > 0,
        level=("start", start[y]) if y in start else None,
        height=height,
    )


def figures(results: Row) -> dict[str, Chart]:
    """The chart worth a file of its own."""
    return {"gold_against_beta": against_beta(results, "gold", OWN, height=300)}


def story(results: Row) -> tuple[str, str, list[Part]]:
    """Title, lead and sections."""
    rows, start = results["curves"], results["starts"][0]
    tops = {row["ref"]: row for row in sorted(rows, key=lambda row: row["gold"])}  # the last of each is its best
    tops = {ref: tops[ref] for ref in NAMES if ref in tops}
    best, own = max(tops.values(), key=lambda row: row["gold"]), tops["self"]
    title = f"Most gold: {NAMES[best['ref']]}, β = {best['beta']:g}."
    lead = (
        "Direct preference optimization pulls a policy toward its preferences and back to a reference; β says how "
        f"hard it is pulled back. The policy starts at a gold reward of **{number(start['gold'])}**. With its own "
        f"reference it got to **{number(own['gold'])}** at β = {own['beta']:g}, "
        f"{number(own['kl'])} nats away. One policy was trained for every reference and β, on the same pairs for "
        "the same number of steps."
    )
    groups = [("Start", [("gold", number(start["gold"])), ("tokens", number(start["length"]))])]
    for ref, row in tops.items():
        values = [("gold", number(row["gold"])), ("KL, nats", number(row["kl"])), ("tokens", number(row["length"]))]
        groups.append((f"{NAMES[ref]}, β = {row['beta']:g}", values))
    shown = {f"{row['ref']} {row['beta']:g}": f"{row['ref']}, β = {row['beta']:g}" for row in rows}
    answers = study.answer_tables(results["samples"], {"gold": "gold", "length": "tokens"}, shown)
    return title, lead, [numbers(groups), *_questions(results), _indicators(results), *answers, _table(rows)]


def _questions(results: Row) -> list[Part]:
    def pair(refs: Sequence[str], second: str) -> list[Chart]:
        return [against_beta(results, name, refs) for name in ("gold", second)]

    strong = "; ".join(f"{NAMES[row['model']]}: {number(row['gold'])}" for row in results["starts"][1:])
    return [
        text("How strong should the pull be? The same data and steps, only β differs.", title="1. How much β"),
        figure(pair(("self",), "kl"), f"Gold and KL against β. {DOTS}", names=("Gold", "KL")),
        figure(
            [against_beta(results, name, ("self",)) for name in ("policy_accuracy", "accuracy")],
            "Held-out pairs ranked right by the policy's own log-probability, and by its reward β log π/π_ref.",
            names=("Policy", "Reward"),
        ),
        text(
            "Is a reference needed at all? Without one (**posterior**) the reward is β log π(y|x); with the "
            "unconditional **prior** it is β log π(y|x)/π(y), the likelihood of the prompt given the answer.",
            title="2. Is a reference needed",
        ),
        figure(pair(OWN, "length"), f"Gold and answer length against β. {DOTS}", names=("Gold", "Length")),
        text(f"References better than the policy itself. Gold of their own answers: {strong}.", title="3. Better ones"),
        figure(pair(("self", *STRONG), "kl"), f"Gold and KL against β. {DOTS}", names=("Gold", "KL")),
    ]


def _indicators(results: Row) -> Part:
    caption = (
        "Before anything is trained: the spread of the reference's margins on the training pairs, which β multiplies; "
        "their correlation with the policy's own margins; how often the reference ranks the chosen answer first."
    )
    columns = ("reference", "sd of margins, nats", "correlation with the policy's", "ranks chosen first")
    rows = [(NAMES[r["ref"]], r["sd"], r["correlation"], percent(r["accuracy"])) for r in results["indicators"]]
    return table(columns, rows, caption)


def _table(rows: Sequence[Row]) -> Part:
    columns = ("reference", "β", "gold", "best checkpoint", "KL, nats", "tokens", "unended", "policy", "reward", "deg.")
    cells = [
        (
            *(NAMES[row["ref"]], f"{row['beta']:g}"),
            *(row.get(name) for name in ("gold", "best_gold", "kl", "length")),
            *(percent(row.get(name)) for name in ("missing_eos", "policy_accuracy", "accuracy")),
            f"{row['degenerate']}/{row['chains']}",
        )
        for row in rows
    ]
    caption = "Means over chains, at the last step; gold also at the checkpoint with the lowest held-out loss."
    return table(columns, cells, caption, title="Every policy")


RECIPE = study.Recipe("references", SETTINGS, chain, collect, story, figures)
