"""References: the log-probabilities that a policy is compared with, computed once, stored, verified, found again.

A reference is a weighted sum of sources, most often one source with weight 1: log π_ref = Σ_k weight_k · log π_k. Each
source has a file of its own, and the sum is made when the files are read.

From top to bottom: what `--ref` names; `obtain`, which a trainer calls; the rules R1 to R9 that a stored reference
must keep; how texts are read and scored; the file of a reference, a folder of Parquet parts and a manifest written
last; and its recipe, everything that decides a number. A file is whole and unchanged, or it is refused.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import itertools
import json
import math
import re
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor

from pyrite import __version__
from pyrite.core import checkpoints, runs
from pyrite.core.processes import Advance, progress, say, world
from pyrite.data import rows as data
from pyrite.data import text
from pyrite.data.responses import Answer, Prompt, Responses
from pyrite.math import seeds
from pyrite.math.logps import Logps
from pyrite.math.ranges import Amplitude, Count, fault
from pyrite.models.forward import score
from pyrite.models.loading import Dtype, backbone, tokenizer_of
from pyrite.models.policy import Policy

PART = 1024  # rows in a part: what an interruption can cost
SIBLINGS = 64  # answers that share their prompt in one packed row
POSITIVE = 1e-3  # nats; a sum of float32 log-probabilities may round to slightly above 0
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # nats a token between two computations of one row
COLUMNS = (("chosen_logprob", "rejected_logprob"), ("ref_chosen_logps", "ref_rejected_logps"))  # RefDPO's, TRL's
EXAMPLE = 'write self, none, column, prior, ema(rate=0.01), a path, or a sum such as "0.5*self + 0.5*PATH"'

Conditioning = Literal["prompt", "prior"]


class BadReference(ValueError):  # noqa: N818, there is a ReferenceError already
    """A reference that cannot be used. The message begins with the rule, R1 to R9, that it breaks."""


# What `--ref` names --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RefSource:
    """One term of a reference. path: of a model, or of a finished reference for kind "table"."""

    kind: Literal["self", "none", "column", "prior", "ema", "model", "table"]
    path: str | None = None
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind}({self.path})" if self.kind == "prior" and self.path else self.path or self.kind


OPTIONS: dict[str, dict[str, Any]] = {  # what each kind takes, with its range; anything else is a path
    "self": {},
    "none": {},
    "column": {"chosen": str, "rejected": str},
    "prior": {"dtype": Dtype},
    "ema": {"rate": Amplitude, "every": Count},
}


def parse(spec: str) -> list[RefSource]:
    """The sources of the reference that a spec names: one, or the terms of a sum.

    self               the policy before training
    none               no reference
    column             columns chosen_logprob and rejected_logprob of the data; column(chosen=NAME, rejected=NAME)
    prior, prior(PATH) the policy before training, or another model, that does not see the prompt
    ema                a moving average of the policy, every so many steps; ema(rate=0.01, every=1)
    PATH               a model (folder or Hub name), or a finished reference (its folder, or a file in it)

    A path takes an option too: dtype=bfloat16 loads a model so. All but none and ema can be terms of a sum, each with a
    weight above 0 (by default 1): 0.5*self + 0.5*PATH. Raises ValueError naming the piece that is wrong.

    >>> [(source.kind, source.weight) for source in parse("0.25*self + 0.75*prior")]
    [('self', 0.25), ('prior', 0.75)]
    """
    whole = spec.strip()
    pieces = [whole] if Path(whole).exists() else re.split(r"\s+\+\s+|\+(?=\s*[\d.]+\s*\*)", whole)
    try:
        sources = [_source(piece.strip()) for piece in pieces]
        for source in sources:
            if source.kind in ("none", "ema") and (len(sources) > 1 or source.weight != 1):
                raise ValueError(f"{source.kind!r} cannot be part of a sum; give it alone, or leave it out")
    except ValueError as error:
        raise ValueError(f"ref {spec!r}: {error}") from None
    return sources


def _source(piece: str) -> RefSource:
    """One term of a sum."""
    found = re.fullmatch(r"(?:([-+]?[\d.]+(?:e[-+]?\d+)?)\s*\*\s*)?(.*)", piece, re.DOTALL)
    assert found is not None  # it matches any text
    number, body = found.groups()
    name, path, options = body, None, {}
    if body.endswith(")") and not Path(body).exists():
        name, _, call = body[:-1].partition("(")
        known = OPTIONS.get(name, {"dtype": Dtype})
        for part in filter(None, (part.strip() for part in call.split(","))):
            option, equals, value = (word.strip() for word in part.partition("="))
            if name == "prior" and path is None and not equals:
                path = part
            elif not equals or option not in known:
                takes = ", ".join(known) or "none at all"
                raise ValueError(f"{part!r} is no option of {piece!r}; it takes {takes}")
            else:
                options[option] = _value(value, known[option], f"{part!r} in {piece!r}")
    if not name:
        raise ValueError(f"{piece!r} names nothing; {EXAMPLE}")
    kind = name if name in OPTIONS else _kind_of(name, piece)
    if path is not None and _kind_of(path, piece) == "table":
        raise ValueError(f"{piece!r} is a finished reference and knows its conditioning; name it alone")
    if kind in ("model", "table"):
        path = str(folder_of(name) or name)
    try:
        weight = 1.0 if number is None else float(number)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(f"the weight in {piece!r} must be a positive number")
    defaults = {"rate": 0.01, "every": 1} if kind == "ema" else {}
    return RefSource(kind, path, weight, defaults | options)  # type: ignore[arg-type]


def _value(word: str, hint: Any, where: str) -> Any:
    """The value of an option, in its range."""
    number = hint in (Amplitude, Count) and re.fullmatch(r"[-+.\de]*\d", word)
    value = (int(word) if word.isdecimal() else float(word)) if number else word
    if wrong := fault(value, hint):
        raise ValueError(f"{where}: {wrong}")
    return value


def _kind_of(name: str, piece: str) -> Literal["model", "table"]:
    """Whether a path is a finished reference or a model."""
    path, near = Path(name), difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.75)
    if folder_of(path):
        return "table"
    if (path / "config.json").exists() or (path / checkpoints.ABOUT).exists():
        return "model"
    if unfinished := [folder for folder in (path, path / "table") if any(folder.glob(PARTS))]:
        raise ValueError(f"{unfinished[0]} is not finished; run the command that began it again")
    if not path.exists() and not near and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        return "model"  # a Hub name
    inner = path / "model"
    hint = f"did you mean {near[0]!r}?" if near else f"did you mean {inner}?" if inner.exists() else EXAMPLE
    raise ValueError(f"{piece!r} is neither a model nor a finished reference; {hint}")


# What a trainer asked for, computed or found, checked, and summed ----------------------------------------------------


def obtain(
    sources: Sequence[RefSource],
    said: Responses,
    *,
    policy: Policy,
    policy_path: str,
    cache: Path,
    tokens: bool = False,
    max_length: int | None = None,
    max_prompt: int | None = None,
    precision: Dtype = "float32",
) -> tuple[Logps | None, list[str | None], list[str]]:
    """Log-probabilities of 2B answers under a reference; why each of B pairs must be dropped, or None; notes.

    said: chosen and rejected answers of the pairs alternately, as the trainer reads them, by the policy's tokenizer and
    these limits. The policy must be as it was before training. A model is scored once, into
    cache/<fingerprint>, and found there by every later run with the same scorer, data and reading, whatever its loss,
    beta and seed. tokens: token log-probabilities are needed. The result is None for "none"; it is not `aligned` if
    one source is known by sums alone, or of another tokenizer. What it returns for pairs that must be dropped means
    nothing.

    Raises BadReference, naming the rule, for a reference that cannot be used, also (R8) for "ema", which has none.
    """
    kinds = {source.kind for source in sources}
    if "none" in kinds:
        return None, [None] * (len(said) // 2), []
    if "ema" in kinds:
        raise BadReference("R8: a reference that moves with the policy has no stored log-probabilities; run it along")
    total, aligned = np.zeros(len(said)), True
    by_text = [np.zeros(length, np.float32) for length in said.lengths.tolist()]
    reasons: list[str | None] = [None] * len(said)
    notes: list[str] = []
    for source in sources:
        if source.kind == "column":
            assert said.truncated is not None  # the trainer has read them
            sums, aligned = _column(source, said, tokens=tokens), False
            why = ["R3: truncation cut the answer for the policy" if cut else None for cut in said.truncated.tolist()]
        else:
            if source.kind == "table":
                table, same_prompts = _named(source, said, policy, tokens=tokens, precision=precision), True
            else:
                table, same_prompts = _scored(
                    source,
                    said,
                    policy=policy,
                    name=source.path or policy_path,
                    lengths=limits(policy.context, max_length, max_prompt),
                    cache=cache,
                    tokens=tokens,
                    precision=precision,
                )
            why = verify(table, said, tokenizer=policy.tokenizer, tokens=tokens, same_prompts=same_prompts)
            notes += _remarks(source, table, policy.tokenizer)
            rows = table.rows(said)
            sums, aligned = table.sum_logp[rows], aligned and same_tokenizer(table, policy.tokenizer)
            if tokens:
                for mine, values in zip(by_text, map(table.tokens, rows), strict=True):
                    if len(values) == len(mine):  # unequal in dropped answers
                        mine += np.float32(source.weight) * values
        total += source.weight * sums
        reasons = [before or now for before, now in zip(reasons, why, strict=True)]
    weight = sum(source.weight for source in sources)
    if not math.isclose(weight, 1):
        notes.append(f"the weights of the reference add up to {weight:g}, not 1: it is no distribution")
    if tokens:
        logps = Logps.from_tokens([torch.from_numpy(row) for row in by_text])
    else:
        logps = Logps.from_sums(torch.from_numpy(total).float(), said.lengths, aligned=aligned)
    dropped = [chosen or rejected for chosen, rejected in zip(reasons[::2], reasons[1::2], strict=True)]
    return logps, dropped, [*notes, _margins_line(logps, dropped)]


def _column(source: RefSource, said: Responses, *, tokens: bool) -> np.ndarray:
    """Log-probabilities (2B,) that the rows of the pairs bring along, chosen and rejected alternately: sums alone.

    Raises BadReference (R1), naming the first, for a sum that is missing, not finite or positive.
    """
    if tokens:
        raise BadReference("R3: a column holds sums only and the loss reads tokens; use a loss of sums, such as dpo")
    named = [(source.options.get("chosen", c), source.options.get("rejected", r)) for c, r in COLUMNS]
    row = said.rows[int(said.prompt[0])]
    names = next((both for both in named if all(name in row for name in both)), named[0])
    sums, where = np.empty(len(said)), name_of(said)
    for i, p in enumerate(said.prompt.tolist()):
        value, holds = said.rows[p].get(names[i % 2]), f"R1: column {names[i % 2]!r} of {where(i)} holds"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadReference(f"{holds} {value!r:.40}; a number is needed, the log-probability in nats")
        if not (math.isfinite(value) and value <= POSITIVE):
            raise BadReference(f"{holds} {value}, which is no log-probability: it must be finite and at most 0")
        sums[i] = value
    return sums


def _named(source: RefSource, said: Responses, policy: Policy, *, tokens: bool, precision: Dtype) -> ReferenceTable:
    """A finished reference that the user names. If it is of this very policy, some rows are computed again (R6)."""
    table = load(str(source.path), tokens=tokens)
    say(f"reference: reused {table.folder}, {len(table)} rows, no model needed")
    if table.recipe["weights"] == weights_hash(policy.model):
        made = table.recipe["numerics"]["compute"]
        if made != precision:
            raise BadReference(
                f"R6: {table.folder} holds this policy's log-probabilities in {made}, and the policy is read in "
                f"{precision}, so margins would not begin at 0: use --ref self, or compute the reference again "
                f"with --precision {precision}"
            )
        known = [i for i, one in enumerate(row_ids(said)) if one in table.places]
        worst = spot_check(table, policy, said.take(known))
        say(f"reference: {min(32, len(known))} rows computed again, they differ by {worst:.2g} nats at most (R6)")
    return table


def _scored(
    source: RefSource,
    said: Responses,
    *,
    policy: Policy,
    name: str,
    lengths: tuple[int, int],
    cache: Path,
    tokens: bool,
    precision: Dtype,
) -> tuple[ReferenceTable, bool]:
    """The file of a model, and whether its prompts are the policy's tokens or read in its own template and limits.

    A model with the policy's tokenizer and template reads like the policy if it has the room, any other in its own way
    with all the room it has. A finished file with the same recipe and all the texts is found first by the model's
    files, so that it need not be loaded, then by its weights.
    """
    path, theirs, context = source.path, policy.tokenizer, policy.context
    if path:
        theirs, context = tokenizer_of(path), context_of_files(path)
    kin = tokenizer_hash(theirs) == tokenizer_hash(policy.tokenizer)
    same = kin and theirs.chat_template == policy.tokenizer.chat_template
    alike = same and context >= lengths[0]
    max_length, max_prompt = lengths if alike else limits(context, None, None)
    reading = read(
        policy.tokenizer if same else theirs,  # the policy's has the run's template arguments, and its ends
        said,
        conditioning="prior" if source.kind == "prior" else "prompt",
        max_length=max_length,
        max_prompt=max_prompt,
        known=alike,
    )
    inside = backbone(policy.model)
    dtype: Dtype = source.options.get("dtype") or ("bfloat16" if inside.dtype == torch.bfloat16 else "float32")
    files = files_hash(path) if path else None
    wanted: dict[str, Any] = {"numerics": arithmetic(dtype=dtype, precision=precision)}
    found = _in_cache(cache, reading, wanted, tokens=tokens, files=files) if files else None
    if found is None:
        scorer = Policy.load(path, dtype=dtype) if path else policy
        recipe = recipe_of(scorer, reading, precision=precision)
        found = _in_cache(cache, reading, {key: recipe[key] for key in ("weights", "numerics")}, tokens=tokens)
        if found is None:
            folder, begin = cache / digest(recipe)[:16], time.monotonic()
            table = compute(scorer, reading, recipe, folder=folder, scorer=name, files=files)
            took = time.monotonic() - begin
            say(f"reference: computed {len(table)} rows of {name} in {took:.1f} s, kept in {folder}")
            return table, alike or not kin
    say(f"reference: reused {found}, no forward pass")
    return load(found, tokens=tokens), alike or not kin


def context_of_files(path: str | Path) -> int:
    """Longest sequence of a model in tokens, from its config alone."""
    folder = checkpoints.place(path)
    settings = checkpoints.config(checkpoints.place(checkpoints.base_name(folder) or folder)).get_text_config()
    return int(getattr(settings, "max_position_embeddings", None) or 1 << 30)


def _in_cache(
    cache: Path, reading: Reading, wanted: Mapping[str, Any], *, tokens: bool, files: str | None = None
) -> Path | None:
    """The folder of a finished reference with this recipe and all the texts, in every process; None without one."""
    found: list[Path | None] = [None]
    if world().is_main_process:
        recipe = {**reading.recipe, **wanted}
        folders = sorted(path.parent for path in cache.glob(f"*/{MANIFEST}"))
        found[0] = next((one for one in folders if _serves(one, reading, recipe, tokens, files)), None)
    broadcast_object_list(found)
    return found[0]


def _serves(folder: Path, reading: Reading, recipe: Mapping[str, Any], tokens: bool, files: str | None) -> bool:
    try:
        manifest = read_manifest(folder)
    except BadReference:
        return False  # not ours
    there = manifest["recipe"]
    if not _within(recipe, there) or (tokens and not there["tokens"]):
        return False
    if files and manifest["scorer"]["files"] != files:
        return False
    if there["data"] == reading.data:
        return True
    table = load(folder, tokens=False)
    ids = dict(zip(table.row_id, zip(table.prompt_ids_sha, table.resp_ids_sha, strict=True), strict=True))
    return all(ids.get(name) == both for name, both in zip(reading.ids, reading.hashes, strict=True))


def _within(wanted: Mapping[str, Any], there: Mapping[str, Any]) -> bool:
    """Whether every wanted value is there."""
    return all(
        _within(value, there.get(name) or {}) if isinstance(value, Mapping) else there.get(name) == value
        for name, value in wanted.items()
    )


def _remarks(source: RefSource, table: ReferenceTable, tokenizer: Any) -> list[str]:
    """What a user should know about one source."""
    remarks, conditioning = [], table.recipe["conditioning"]
    if not same_tokenizer(table, tokenizer):
        remarks.append(f"{source} has another tokenizer: sums are compared, on answers that both read whole")
    elif table.recipe["template"]["sha256"] != template_hash(tokenizer):
        remarks.append(f"{source} reads prompts in its own chat template, which is not the policy's")
    if conditioning["kind"] == "prior":
        remarks.append(f"{source} scores answers without their prompts, after {conditioning['header']!r}")
    return remarks


def _margins_line(logps: Logps, dropped: Sequence[str | None]) -> str:
    """R9: the margins of the pairs that are kept, in one line."""
    kept = torch.tensor([reason is None for reason in dropped]).repeat_interleave(2)
    if not kept.any():
        return "reference margins: no pair is left"
    seen = margins(logps.sum[kept].double().numpy())
    quantiles = ", ".join(f"{seen[name]:.3g}" for name in ("q05", "q25", "q50", "q75", "q95"))
    spread = f"mean {seen['mean']:.4g}, sd {seen['sd']:.4g} nats, quantiles 5 25 50 75 95 %: {quantiles}"
    return f"reference margins: {spread}; it ranks chosen first in {seen['accuracy']:.1%} of the pairs"


def margins(logp: np.ndarray) -> dict[str, Any]:
    """Of the margins m = log π_ref(chosen) − log π_ref(rejected) of B pairs: mean, sd, quantiles, ranking accuracy.

    logp (2B,): chosen and rejected alternately, nats. Accuracy: the share of pairs with m > 0, ties ½.
    """
    m = np.asarray(logp[::2], dtype=np.float64) - np.asarray(logp[1::2], dtype=np.float64)
    quantiles = {f"q{100 * share:02.0f}": float(np.quantile(m, share)) for share in (0.05, 0.25, 0.5, 0.75, 0.95)}
    sd = float(m.std(ddof=1)) if len(m) > 1 else 0.0
    return {"mean": float(m.mean()), "sd": sd, **quantiles, "accuracy": float(((m > 0) + 0.5 * (m == 0)).mean())}


# Rules that a reference must keep before a run may use it; each refusal names the rule and the first row -------------


def same_tokenizer(table: ReferenceTable, tokenizer: Any) -> bool:
    """Whether a reference was made with this tokenizer, so that its tokens are the trainer's."""
    return table.recipe["tokenizer"] == tokenizer_hash(tokenizer)


def verify(
    table: ReferenceTable, said: Responses, *, tokenizer: Any = None, tokens: bool = False, same_prompts: bool = True
) -> list[str | None]:
    """Why each of N answers must be dropped, None for those to keep.

    said: the answers, with their tokens if a trainer has read them with its tokenizer; a reference of that tokenizer
    must have read the same ids (R2), one of another must have scored the same whole text (R3, otherwise the answer is
    dropped). Without `tokenizer` it is taken to be the reference's own. tokens: token log-probabilities are needed.
    same_prompts: R2 holds for prompts too. Raises BadReference, naming the rule and the first answer, if the reference
    cannot be used.
    """
    name = name_of(said)
    rows = [_row_of(table, one, name, i) for i, one in enumerate(row_ids(said))]
    same = tokenizer is None or same_tokenizer(table, tokenizer)
    if tokens and not same:
        raise BadReference(
            f"R3: {table.folder} was made with another tokenizer, so its tokens are not the policy's; "
            "use a loss of summed log-probabilities, such as dpo"
        )
    if tokens and table.token_logp is None:
        raise BadReference(f"R3: {table.folder} holds sums only and the loss reads tokens; compute it with tokens")
    reasons: list[str | None] = [None] * len(said)
    if said.truncated is not None:
        prior = table.recipe["conditioning"]["kind"] == "prior"
        if not (same and same_prompts):
            cut = [False] * len(said) if prior or tokenizer is None else cut_prompts(tokenizer, said)
            sides = zip(rows, said.truncated.tolist(), cut, strict=True)
            reasons = [_cut(table, *side, lossless=same) for side in sides]
        if same:
            for i, (row, asked, ids) in enumerate(zip(rows, said.asked(), said.tokens(), strict=True)):
                if reasons[i] is None:
                    _check_ids(table, row, asked if same_prompts and not prior else None, ids, name(i))
    none = "R4: the answer has no tokens"
    return [none if table.n_resp_tokens[row] == 0 else why for row, why in zip(rows, reasons, strict=True)]


def _row_of(table: ReferenceTable, one: str, name: Callable[[int], str], i: int) -> int:
    """R1: every answer is there, with a log-probability."""
    row = table.places.get(one)
    if row is None:
        raise BadReference(f"R1: {table.folder}: {name(i)} is not there; it was made from other data: compute it again")
    value = table.sum_logp[row]
    if not (np.isfinite(value) and value <= POSITIVE):
        wrong = f"has {value:g}, which is no log-probability; it must be finite and at most 0"
        raise BadReference(f"R1: {table.folder}: {name(i)} {wrong}: compute it again")
    return row


def _check_ids(table: ReferenceTable, row: int, asked: Sequence[int] | None, said: Sequence[int], name: str) -> None:
    """R2: the answer was read as the trainer's tokens, and its prompt too, if it is given."""
    other = ids_hash(said) != table.resp_ids_sha[row]
    if other or (asked is not None and ids_hash(asked) != table.prompt_ids_sha[row]):
        counts, mine = (table.n_resp_tokens, said) if other or asked is None else (table.n_prompt_tokens, asked)
        raise BadReference(
            f"R2: {table.folder}: {'' if other else 'the prompt of '}{name} was read as other tokens ({counts[row]}) "
            f"than the policy's ({len(mine)}): another truncation or chat template; compute it again with the "
            "policy's, or name the model that scored, which then reads in its own way"
        )


def _cut(table: ReferenceTable, row: int, truncated: bool, cut: bool, *, lossless: bool) -> str | None:
    """R3: both models must have scored the whole text."""
    if truncated or table.truncated[row]:
        return "R3: truncation cut the answer for the policy or the reference"
    if cut or table.prompt_truncated[row]:
        return "R3: truncation cut the prompt for the policy or the reference"
    if not lossless and table.n_unknown[row]:
        return "R3: the tokenizer of the reference does not know part of the answer"
    return None


def spot_check(table: ReferenceTable, policy: Policy, said: Responses, *, rows: int = 32, seed: int = 0) -> float:
    """R6: random rows computed again by the scorer; the largest difference, nats.

    Raises BadReference if a row differs by more than 1e-3 · max(1, T) nats over T tokens in float32 (2e-2 in
    bfloat16): another model, template or arithmetic, or a changed file.
    """
    pick = torch.randperm(len(said), generator=seeds.generator(seed, "spot check"))[:rows].tolist()
    recipe = table.recipe
    kind = recipe["conditioning"]["kind"]
    lengths = {name: recipe["truncation"][name] for name in ("max_length", "max_prompt")}
    reading = read(policy.tokenizer, texts(said, pick), conditioning=kind, **lengths)
    coarse = "bfloat16" in (recipe["numerics"]["weights"], recipe["numerics"]["compute"])
    worst = 0.0
    values = token_values(policy, reading.said, 16384, recipe["numerics"]["compute"])
    for i, (one, value) in enumerate(zip(reading.ids, values, strict=True)):
        stored, now = float(table.sum_logp[table.places[one]]), float(value.sum(dtype=np.float64))
        allowed = TOLERANCE["bfloat16" if coarse else "float32"] * max(1, len(value))
        if not abs(stored - now) <= allowed:
            raise BadReference(
                f"R6: {table.folder}: {name_of(reading.said)(i)} has {stored:.4f} nats there and {now:.4f} now "
                f"(allowed: {allowed:.3f}); another model, template or precision made it"
            )
        worst = max(worst, abs(stored - now))
    return worst


# Texts as a scorer reads them, and their log-probabilities -----------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reading:
    """N distinct answers as a scorer reads them, and the part of the recipe that says how.

    cut: whether the prompt lost its beginning. unknown: the id of text that the tokenizer does not know, if it has one.
    """

    said: Responses
    ids: list[str]
    cut: list[bool]
    unknown: int | None
    recipe: dict[str, Any]

    @cached_property
    def hashes(self) -> list[tuple[str, str]]:
        """Hashes of the prompt and answer ids of each text."""
        asked, said = self.said.asked(), self.said.tokens()
        return [(ids_hash(prompt), ids_hash(ids)) for prompt, ids in zip(asked, said, strict=True)]

    @cached_property
    def data(self) -> dict[str, Any]:
        """What is scored, in any order: the texts, and the ids they became."""
        rows = sorted(zip(self.ids, self.hashes, strict=True))
        return {"rows": len(rows), "sha256": digest([row for row, _ in rows]), "ids": digest(rows)}


def limits(context: int, max_length: int | None, max_prompt: int | None) -> tuple[int, int]:
    """Longest text and longest prompt in tokens; by default, as in training, the context and three quarters of it."""
    whole = context if max_length is None else max_length
    return whole, whole * 3 // 4 if max_prompt is None else max_prompt


def read(
    tokenizer: Any,
    said: Responses,
    *,
    conditioning: Conditioning = "prompt",
    max_length: int,
    max_prompt: int,
    known: bool = False,
) -> Reading:
    """Answers as ids, each distinct one once, those to one prompt side by side.

    conditioning "prior" reads the answers without their prompts, after `prior_prompt`. known: `said` already has the
    tokens that this tokenizer and these limits give. Raises ValueError naming the answer if its prompt leaves no room.
    """
    lengths: dict[str, Any] = {"max_length": max_length, "max_prompt": max_prompt}
    recipe = recipe_of_reading(tokenizer, conditioning=conditioning, **lengths)
    ids, prompts = row_ids(said), [repr(prompt) for prompt in said.prompts]
    first = {name: i for i, name in reversed([*enumerate(ids)])}
    asked = {prompt: i for i, prompt in reversed([*enumerate(prompts)])}
    index = sorted(sorted(first.values()), key=lambda i: asked[prompts[i]])
    made = said.take(index) if known else texts(said, index)
    if not known:
        made = text.encode(tokenizer, made, where=name_of(made), **lengths)
    cut = cut_prompts(tokenizer, made) if conditioning == "prompt" else [False] * len(made)
    if conditioning == "prior":
        _, opening = prior_prompt(tokenizer)
        if len(opening) > max_prompt:
            raise ValueError(
                f"max_prompt {max_prompt} leaves no room for the {len(opening)} tokens a prior begins with"
            )
        made = replace(made, prompt_ids=[opening] * len(made.prompt_ids))
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id != text.end_id(tokenizer) else None
    return Reading(made, [ids[i] for i in index], cut, unknown, recipe)


def texts(said: Responses, index: Sequence[int]) -> Responses:
    """Some of the answers without their tokens: whole again if a tokenizer cut them."""
    rows = [said.rows[p] for p in said.prompt[torch.tensor(index, dtype=torch.int64)].tolist()]
    ends = said.finished if said.truncated is None else said.finished | said.truncated
    return Responses.said(rows, [said.texts[i] for i in index], finished=ends[torch.tensor(index, dtype=torch.int64)])


def cut_prompts(tokenizer: Any, said: Responses) -> list[bool]:
    """Whether each prompt lost its beginning to a limit."""
    whole = text.encode_prompts(tokenizer, said.prompts)
    return [len(prompt) < len(ids) for prompt, ids in zip(said.asked(), whole, strict=True)]


def name_of(said: Responses) -> Callable[[int], str]:
    """A function that names an answer in errors: how it and its prompt begin, with file and line if they are known."""

    def name(i: int) -> str:
        row, answer = said.rows[int(said.prompt[i])], said.texts[i]
        begins, asked = answer if isinstance(answer, str) else answer["content"], repr(text.plain(row["prompt"])[:40])
        place = data.place(row, asked)
        return f"the answer {begins[:40]!r} to {asked}{'' if place == asked else f' ({place})'}"

    return name


def recipe_of(policy: Policy, reading: Reading, *, precision: Dtype = "float32") -> dict[str, Any]:
    """Everything that decides the numbers of a reference. Its digest is the fingerprint, known before scoring."""
    scorer = recipe_of_model(policy, precision=precision)
    return {**reading.recipe, **scorer, "data": reading.data, "tokens": True}


def compute(
    policy: Policy,
    reading: Reading,
    recipe: Mapping[str, Any],
    *,
    folder: Path,
    scorer: str,
    files: str | None = None,
    budget: int = 16384,
) -> ReferenceTable:
    """Score what was read by its recipe and store it. Parts are dealt out to the processes.

    An interrupted computation goes on where it stopped. scorer: the model's name, for the manifest. Raises BadReference
    if the folder holds another reference or cannot be written (R7), or if the model gives no number (R1).
    """
    fingerprint = digest(recipe)
    if begin(folder, fingerprint):
        return load(folder)
    state, total = world(), len(reading.ids)
    with progress("reference", total, unit="answers") as advance:
        for number in range(-(-total // PART))[state.process_index :: state.num_processes]:
            rows = range(number * PART, min((number + 1) * PART, total))
            path = folder / f"part-{number:05d}.parquet"
            if whole_part(path, [reading.ids[i] for i in rows]):
                advance(len(rows))
                continue
            values = token_values(policy, reading.said.take(rows), budget, recipe["numerics"]["compute"], advance)
            write_part(path, _part(reading, rows, values), fingerprint)
    state.wait_for_everyone()
    if state.is_main_process:
        revision = getattr(policy.model.config, "_commit_hash", None)
        about = {"scorer": {"name": scorer, "revision": revision, "files": files}, "device": policy.device.type}
        finish(folder, recipe, **about)
    state.wait_for_everyone()
    return load(folder)


def token_values(
    policy: Policy, said: Responses, budget: int, precision: Dtype, advance: Advance | None = None
) -> list[np.ndarray]:
    """log π(y_t | x, y_<t) of each text, (T,) float32. Neighbors with the same prompt are packed together."""
    training, prompts = policy.training, said.asked()
    runs = [list(run) for _, run in itertools.groupby(range(len(prompts)), key=prompts.__getitem__)]
    groups = [run[begin : begin + SIBLINGS] for run in runs for begin in range(0, len(run), SIBLINGS)]
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        values = score(policy, said, groups, budget=budget, progress=advance)
    policy.train(training)
    return [value.numpy() for value in said.split(values)]


def _part(reading: Reading, rows: range, values: list[np.ndarray]) -> pa.Table:
    """One part of the table. Raises BadReference for a value that is not a number, so that none is stored."""
    sums = np.array([value.sum(dtype=np.float64) for value in values])
    if not np.isfinite(sums).all():
        bad = int((~np.isfinite(sums)).argmax())
        name = name_of(reading.said)(rows[bad])
        raise BadReference(f"R1: {name}: the model gives {sums[bad]}; is it sound, in this dtype?")
    some, at = reading.said.take(rows), slice(rows.start, rows.stop)
    assert some.truncated is not None  # they have been encoded
    columns: dict[str, Any] = {
        "row_id": reading.ids[at],
        "prompt_ids_sha": [prompt for prompt, _ in reading.hashes[at]],
        "resp_ids_sha": [answer for _, answer in reading.hashes[at]],
        "n_prompt_tokens": [len(prompt) for prompt in some.asked()],
        "n_resp_tokens": some.lengths.tolist(),
        "n_unknown": [0 if reading.unknown is None else ids.count(reading.unknown) for ids in some.tokens()],
        "truncated": some.truncated.tolist(),
        "prompt_truncated": reading.cut[at],
        "sum_logp": sums,
    }
    begins = np.cumsum([0, *map(len, values)]).astype(np.int32)
    tokens = pa.ListArray.from_arrays(pa.array(begins), pa.array(np.concatenate(values)))
    return pa.table(columns, schema=SCHEMA).append_column("token_logp", tokens)


# The file ------------------------------------------------------------------------------------------------------------

FORMAT = "pyrite reference 1"
MANIFEST, PARTS = "manifest.json", "part-*.parquet"
SCHEMA = pa.schema(
    {
        "row_id": pa.string(),
        "prompt_ids_sha": pa.string(),
        "resp_ids_sha": pa.string(),
        "n_prompt_tokens": pa.int32(),
        "n_resp_tokens": pa.int32(),
        "n_unknown": pa.int32(),  # tokens of the answer that stand for text the tokenizer does not know
        "truncated": pa.bool_(),
        "prompt_truncated": pa.bool_(),
        "sum_logp": pa.float64(),
    }
)
# of a model's config: where it came from and what generation reads, which no log-probability depends on
_IDLE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "pad_token_id", "pyrite")


@dataclass(frozen=True, eq=False)
class ReferenceTable:
    """N texts scored by one model: a list or an array (N,) for each column, log-probabilities in nats.

    token_logp: float32, the rows' tokens one after the other. None if only the sums are known or were read.
    """

    folder: Path
    manifest: dict[str, Any]
    row_id: list[str]
    prompt_ids_sha: list[str]
    resp_ids_sha: list[str]
    n_prompt_tokens: np.ndarray
    n_resp_tokens: np.ndarray
    n_unknown: np.ndarray
    truncated: np.ndarray
    prompt_truncated: np.ndarray
    sum_logp: np.ndarray
    token_logp: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.row_id)

    @property
    def recipe(self) -> dict[str, Any]:
        """Everything that can change a number: scorer, tokenizer, template, conditioning, truncation, precision."""
        return self.manifest["recipe"]

    @cached_property
    def places(self) -> dict[str, int]:
        """Row of each row_id."""
        return {name: row for row, name in enumerate(self.row_id)}

    @cached_property
    def _begins(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.n_resp_tokens.astype(np.int64))])

    def rows(self, said: Responses) -> list[int]:
        """The rows of some of its texts."""
        return [self.places[name] for name in row_ids(said)]

    def tokens(self, row: int) -> np.ndarray:
        """Token log-probabilities of one row, (T,) float32."""
        assert self.token_logp is not None
        return self.token_logp[self._begins[row] : self._begins[row + 1]]


def row_id(prompt: Prompt, answer: Answer) -> str:
    """sha256 of the canonical JSON of the messages. A prompt given as a str is one user message."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    return digest([*turns, {"role": "assistant", **({"content": answer} if isinstance(answer, str) else answer)}])


def row_ids(said: Responses) -> list[str]:
    """The id of each of N responses."""
    return [row_id(prompt, answer) for prompt, answer in zip(said.prompts, said.texts, strict=True)]


def folder_of(path: str | Path) -> Path | None:
    """The folder of a finished reference, given itself, a file in it, or the run that made it. None without one."""
    given = Path(path)
    for folder in (given.parent if given.is_file() else given, given / "table"):
        if (folder / MANIFEST).exists() and any(folder.glob(PARTS)):
            return folder
    return None


def load(path: str | Path, *, tokens: bool = True) -> ReferenceTable:
    """A finished reference from its folder, a file in it, or the run that made it. Without `tokens`, only its sums.

    Raises BadReference (R7) if it is not finished or was changed since, (R5) if numbers are below float32.
    """
    folder = folder_of(path) or Path(path)
    manifest = read_manifest(folder)
    if digest(manifest["recipe"]) != manifest["fingerprint"]:
        raise BadReference(f"R7: {folder / MANIFEST}: the recipe does not match its fingerprint; compute it again")
    if "imported" in manifest["recipe"]:
        raise BadReference(
            f"R7: {folder} was imported by an earlier version; put its sums into columns of the data: --ref column"
        )
    parts = [_read_part(folder / part["name"], part["sha256"], tokens=tokens) for part in manifest["parts"]]
    whole = pa.concat_tables(parts)
    columns = {name: whole[name].to_numpy() for name in SCHEMA.names}
    for name in ("row_id", "prompt_ids_sha", "resp_ids_sha"):
        columns[name] = columns[name].tolist()
    has_tokens = tokens and "token_logp" in whole.column_names
    flat = pa.chunked_array([part["token_logp"].combine_chunks().flatten() for part in parts]) if has_tokens else None
    table = ReferenceTable(folder, manifest, **columns, token_logp=None if flat is None else flat.to_numpy())
    if len(table.places) != len(table) or len(table) != manifest["recipe"]["data"]["rows"]:
        raise BadReference(f"R1: {folder}: {len(table)} rows, {len(table.places)} of them distinct; compute it again")
    return table


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished reference. Raises BadReference (R7) without one."""
    try:
        manifest = runs.read_json(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        fault = "is not finished" if any(folder.glob(PARTS)) else "holds no reference"
        raise BadReference(f"R7: {folder} {fault} (no {MANIFEST}); run `pyrite reference`") from None
    except (OSError, ValueError) as error:
        raise BadReference(f"R7: {folder / MANIFEST} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BadReference(f"R7: {folder / MANIFEST} is not the manifest of a reference ({FORMAT!r}); name its folder")
    return manifest


def _read_part(path: Path, sha256: str, *, tokens: bool) -> pa.Table:
    if not path.exists():
        raise BadReference(f"R7: {path} is missing; copy the whole folder, or compute it again")
    if file_hash(path) != sha256:
        raise BadReference(f"R7: {path} was changed after it was written (its checksum differs); compute it again")
    found = pq.read_schema(path)
    if missing := [name for name in SCHEMA.names if name not in found.names]:
        raise BadReference(f"R7: {path} has no column {missing[0]}; compute it again")
    kinds = [found.field("sum_logp").type]
    kinds += [found.field("token_logp").type.value_type] if "token_logp" in found.names else []
    if any(kind not in (pa.float32(), pa.float64()) for kind in kinds):
        raise BadReference(f"R5: {path} stores log-probabilities as {kinds[0]}; float32 at least is needed")
    wanted = [*SCHEMA.names, "token_logp"] if tokens and "token_logp" in found.names else SCHEMA.names
    return pq.read_table(path, columns=wanted)


def begin(folder: Path, fingerprint: str) -> bool:
    """Make the folder. Returns whether it already holds this very reference, finished.

    Raises BadReference (R7) if it cannot be made, or holds another reference, finished or begun.
    """
    if (folder / MANIFEST).exists():
        if load(folder, tokens=False).manifest["fingerprint"] != fingerprint:
            raise BadReference(f"R7: {folder} holds another reference already; delete it or choose another folder")
        return True
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    for path in folder.glob(PARTS):
        with contextlib.suppress(OSError, pa.ArrowException):  # a damaged part is computed again
            if (pq.read_schema(path).metadata or {}).get(b"fingerprint", b"").decode() != fingerprint:
                raise BadReference(
                    f"R7: {folder} holds an unfinished reference of something else; delete it or choose another"
                )
    return False


def write_part(path: Path, part: pa.Table, fingerprint: str) -> None:
    """Write one part, whole or not at all. Raises BadReference (R7) if it cannot be written."""
    sink = pa.BufferOutputStream()
    pq.write_table(part.replace_schema_metadata({"fingerprint": fingerprint}), sink, write_page_checksum=True)
    try:
        runs.write_bytes(path, sink.getvalue())
    except OSError as error:
        raise unwritable(path, error) from error


def whole_part(path: Path, ids: Sequence[str]) -> bool:
    """Whether a part that an interrupted computation left is sound and holds these rows."""
    try:
        part = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        return False
    return "row_id" in part.column_names and part["row_id"].to_pylist() == list(ids)


def finish(folder: Path, recipe: Mapping[str, Any], **about: Any) -> None:
    """Write the manifest of the parts in `folder`, the last file of all. `about` changes no number."""
    parts = sorted(folder.glob(PARTS))
    listed = [{"name": path.name, "rows": pq.read_metadata(path).num_rows, "sha256": file_hash(path)} for path in parts]
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    manifest = {"format": FORMAT, "fingerprint": digest(recipe), "recipe": recipe, "parts": listed, **about}
    try:
        runs.write_json(folder / MANIFEST, {**manifest, "created": created})
    except OSError as error:
        raise unwritable(folder / MANIFEST, error) from error


def unwritable(path: Path, error: OSError) -> BadReference:
    """The error to raise if a reference cannot be written."""
    reason = error.strerror or error
    return BadReference(f"R7: cannot write {path}: {reason}; make room and run again, finished parts are kept")


# The recipe: everything that decides the numbers ---------------------------------------------------------------------


def recipe_of_model(policy: Policy, *, precision: Dtype) -> dict[str, Any]:
    """Which model scores, and in which arithmetic."""
    model = backbone(policy.model)
    attention = "packed" if policy.packed else str(model.config._attn_implementation)
    numerics = arithmetic(dtype=str(model.dtype).removeprefix("torch."), precision=precision)
    return {"weights": weights_hash(policy.model), "numerics": {**numerics, "attention": attention}}


def arithmetic(*, dtype: str, precision: Dtype) -> dict[str, Any]:
    """Precisions of weights and products, and the version of the code."""
    return {"weights": dtype, "compute": precision, "code": __version__}


def recipe_of_reading(tokenizer: Any, *, conditioning: str, max_length: int, max_prompt: int) -> dict[str, Any]:
    """How texts become ids: tokenizer, template, conditioning, truncation."""
    prior = dict(zip(("header", "ids"), prior_prompt(tokenizer), strict=True)) if conditioning == "prior" else {}
    template = {
        "sha256": template_hash(tokenizer),
        "arguments": text.template_arguments(tokenizer),
        "start_token": _start(tokenizer),
        "end_token": text.end_id(tokenizer),
    }
    return {
        "tokenizer": tokenizer_hash(tokenizer),
        "template": template,
        "conditioning": {"kind": conditioning, **prior},
        "truncation": {"max_length": max_length, "max_prompt": max_prompt},
    }


def weights_hash(model: Any) -> str:
    """sha256 of names, dtypes, shapes and bytes of all weights, adapters and architecture settings included.

    Adapters that add nothing yet (B = 0) are left out: a policy with fresh adapters is still its base model.
    """
    inside = backbone(model)
    state = inside.state_dict()
    fresh = all(not bool(value.any()) for name, value in state.items() if "lora_B" in name)
    kept: dict[tuple[Any, ...], tuple[str, Tensor]] = {}  # each storage once, by the first of its names
    for name in sorted(state):
        if not (fresh and "lora_" in name):
            value = state[name].detach()
            kept.setdefault((value.data_ptr(), value.shape), (name.replace(".base_layer.", "."), value))
    with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock to the others
        hashes = list(pool.map(_bytes_hash, [value for _, value in kept.values()]))
    named = [[name, str(v.dtype), list(v.shape), seen] for (name, v), seen in zip(kept.values(), hashes, strict=True)]
    config = {key: value for key, value in inside.config.to_dict().items() if key not in _IDLE}
    scales = {}
    if isinstance(model, PeftModel) and not fresh:
        adapters: Any = model.peft_config
        scales = {name: [one.r, one.lora_alpha, one.use_rslora] for name, one in adapters.items()}
    return digest([named, json.loads(json.dumps(config, default=str), parse_constant=str), scales])


def _bytes_hash(value: Tensor) -> str:
    flat = value.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what turns text to ids: vocabulary, merges, normalizer, added and special tokens; not the template."""
    if tokenizer.is_fast:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        parts = {name: parts.get(name) for name in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    else:
        parts = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "cls", "sep", "unk")]
    return digest([parts, special])


def template_hash(tokenizer: Any) -> str | None:
    """sha256 of the chat template, None without one."""
    return digest(tokenizer.chat_template) if tokenizer.chat_template else None


def prior_prompt(tokenizer: Any) -> tuple[str, list[int]]:
    """What a model reads before an answer without its prompt, as text and as ids.

    If the chat template opens an answer with a header, the start token (if the template writes one) and exactly that
    header; otherwise the start token alone. Raises ValueError for a tokenizer with neither.
    """
    opening = ""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "x"}]
        shown, asked = (text.render(tokenizer, turn, ask=ask) for ask in (False, True))
        header = asked[len(shown) :] if asked.startswith(shown) else ""
        begins = tokenizer.bos_token if tokenizer.bos_token and asked.startswith(tokenizer.bos_token) else ""
        opening = begins + header
    ids = tokenizer(opening, add_special_tokens=False, verbose=False)["input_ids"] if opening else []
    if ids:
        return opening, list(ids)
    start = _start(tokenizer)
    if start is None:
        raise ValueError("a prior needs a start token or a chat template with a header; this tokenizer has neither")
    return tokenizer.convert_ids_to_tokens(start), [start]


def _start(tokenizer: Any) -> int | None:
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id


def files_hash(path: str | Path) -> str:
    """Hash of a model's files, those of the base below adapters included."""
    folder = checkpoints.place(path)
    base = checkpoints.base_name(folder)
    return digest([runs.fingerprint(folder), files_hash(base) if base else ""])


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ids_hash(ids: Sequence[int]) -> str:
    """sha256 of token ids."""
    return hashlib.sha256(array("i", ids).tobytes()).hexdigest()


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    written = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(written.encode("utf-8", "surrogatepass")).hexdigest()
