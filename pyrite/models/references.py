"""References: what a policy is compared with. Computed once, stored with a fingerprint, verified, mixed, imported.

log π_ref(y | x) = Σ_k weight_k · log π_k(y | x)
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import broadcast_object_list

from pyrite.core import checkpoints
from pyrite.core.processes import Advance, progress, say, world
from pyrite.data import rows as data
from pyrite.data import text
from pyrite.data.responses import Responses
from pyrite.data.text import plain
from pyrite.math import seeds
from pyrite.math.logps import Logps
from pyrite.math.ranges import Amplitude, Count, fault
from pyrite.models import reference_tables as tables
from pyrite.models.forward import score
from pyrite.models.loading import Dtype, backbone, tokenizer_of
from pyrite.models.policy import Policy
from pyrite.models.reference_tables import BadReference, ReferenceTable, load, margins, row_ids

__all__ = ["BadReference", "RefSource", "ReferenceTable", "load", "margins", "obtain", "parse"]

PART = 1024  # rows in a part: what an interruption can cost
SIBLINGS = 64  # answers that share their prompt in one packed row
POSITIVE = 1e-3  # nats; a sum of float32 log-probabilities may round to slightly above 0
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # nats a token between two computations of one row
COLUMNS = (("chosen_logprob", "rejected_logprob"), ("ref_chosen_logps", "ref_rejected_logps"))  # RefDPO's, TRL's
EXAMPLE = 'write self, none, column, prior, ema(rate=0.01), a path, or a sum such as "0.5*self + 0.5*PATH"'

Conditioning = Literal["prompt", "prior"]


# Specs: "self", "prior", a path, "0.5*self + 0.5*PATH" ---------------------------------------------------------------


@dataclass(frozen=True)
class RefSource:
    """One reference and its weight in a sum; `path` of a model, or of a finished reference for kind "table"."""

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
    """The sources of a spec, a weighted sum of log-probabilities: log π_ref = Σ_k weight_k · log π_k.

    self               the policy before training
    none               no reference
    column             columns chosen_logprob and rejected_logprob of the data; column(chosen=NAME, rejected=NAME)
    prior, prior(PATH) the policy before training, or another model, that does not see the prompt
    ema                a moving average of the policy, every so many steps; ema(rate=0.01, every=1)
    PATH               a model (folder or Hub name), or a finished reference (its folder, or a file in it)

    A path takes an option too: dtype=bfloat16 loads a model so. Raises ValueError naming the piece that is wrong.

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
    number, body = re.fullmatch(r"(?:([-+]?[\d.]+(?:e[-+]?\d+)?)\s*\*\s*)?(.*)", piece, re.DOTALL).groups()  # type: ignore[union-attr]
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
        path = str(tables.folder_of(name) or name)
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
    if tables.folder_of(path):
        return "table"
    if (path / "config.json").exists() or (path / checkpoints.ABOUT).exists():
        return "model"
    if unfinished := [folder for folder in (path, path / "table") if any(folder.glob(tables.PARTS))]:
        raise ValueError(f"{unfinished[0]} is not finished; run the command that began it again")
    if not path.exists() and not near and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        return "model"  # a Hub name
    inner = path / "model"
    hint = f"did you mean {near[0]!r}?" if near else f"did you mean {inner}?" if inner.exists() else EXAMPLE
    raise ValueError(f"{piece!r} is neither a model nor a finished reference; {hint}")


# Compute: the texts as a scorer reads them, then their log-probabilities in a file -----------------------------------


@dataclass(frozen=True, eq=False)
class Reading:
    """N distinct answers as a scorer reads them, and the part of the recipe that says how.

    cut: whether its prompt lost its beginning; unknown: the id that stands for text the tokenizer does not know, None
    without one.
    """

    said: Responses
    ids: list[str]
    cut: list[bool]
    unknown: int | None
    recipe: dict[str, Any]

    @cached_property
    def hashes(self) -> list[tuple[str, str]]:
        """Of the prompt and answer ids of each text."""
        asked, said = self.said.asked(), self.said.tokens()
        return [(tables.ids_hash(prompt), tables.ids_hash(ids)) for prompt, ids in zip(asked, said, strict=True)]

    @cached_property
    def data(self) -> dict[str, Any]:
        """What is scored, whatever its order: the texts, and the ids they became."""
        rows = sorted(zip(self.ids, self.hashes, strict=True))
        return {"rows": len(rows), "sha256": tables.digest([row for row, _ in rows]), "ids": tables.digest(rows)}


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

    conditioning "prior" reads the answers without their prompts, after `tables.prior_prompt`. known: `said` has the
    tokens that this tokenizer and these limits give already. Raises ValueError naming the answer for a prompt that
    leaves no room.
    """
    lengths: dict[str, Any] = {"max_length": max_length, "max_prompt": max_prompt}
    recipe = tables.recipe_of_reading(tokenizer, conditioning=conditioning, **lengths)
    ids, prompts = row_ids(said), [repr(prompt) for prompt in said.prompts]
    first = {name: i for i, name in reversed([*enumerate(ids)])}
    asked = {prompt: i for i, prompt in reversed([*enumerate(prompts)])}
    index = sorted(sorted(first.values()), key=lambda i: asked[prompts[i]])
    made = said.take(index) if known else texts(said, index)
    if not known:
        made = text.encode(tokenizer, made, where=name_of(made), **lengths)
    cut = cut_prompts(tokenizer, made) if conditioning == "prompt" else [False] * len(made)
    if conditioning == "prior":
        _, opening = tables.prior_prompt(tokenizer)
        if len(opening) > max_prompt:
            raise ValueError(
                f"max_prompt {max_prompt} leaves no room for the {len(opening)} tokens a prior begins with"
            )
        made = replace(made, prompt_ids=[opening] * len(made.prompt_ids))
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id != text.end_id(tokenizer) else None
    return Reading(made, [ids[i] for i in index], cut, unknown, recipe)


def texts(said: Responses, index: Sequence[int]) -> Responses:
    """Some of the answers without their tokens, as they were before a tokenizer cut them."""
    rows = [said.rows[p] for p in said.prompt[torch.tensor(index, dtype=torch.int64)].tolist()]
    ends = said.finished if said.truncated is None else said.finished | said.truncated
    return Responses.said(rows, [said.texts[i] for i in index], finished=ends[torch.tensor(index, dtype=torch.int64)])


def cut_prompts(tokenizer: Any, said: Responses) -> list[bool]:
    """Whether each prompt lost its beginning to a limit."""
    whole = text.encode_prompts(tokenizer, said.prompts)
    return [len(prompt) < len(ids) for prompt, ids in zip(said.asked(), whole, strict=True)]


def name_of(said: Responses) -> Callable[[int], str]:
    """What errors call an answer: how it begins, and how its prompt does, with file and line if they are known."""

    def name(i: int) -> str:
        row, answer = said.rows[int(said.prompt[i])], said.texts[i]
        begins, asked = answer if isinstance(answer, str) else answer["content"], repr(plain(row["prompt"])[:40])
        place = data.place(row, asked)
        return f"the answer {begins[:40]!r} to {asked}{'' if place == asked else f' ({place})'}"

    return name


def recipe_of(policy: Policy, reading: Reading, *, precision: Dtype = "float32") -> dict[str, Any]:
    """Everything that decides the numbers of a reference; its digest is the fingerprint, known before scoring."""
    scorer = tables.recipe_of_model(policy, precision=precision)
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
    """Score what was read by its recipe and store it; parts are dealt out to the processes.

    An interrupted computation goes on where it stopped. scorer: the model's name, for the manifest. Raises BadReference
    if the folder holds another reference or cannot be written (R7), or the model gives no number (R1).
    """
    fingerprint = tables.digest(recipe)
    if tables.begin(folder, fingerprint):
        return load(folder)
    state, total = world(), len(reading.ids)
    with progress("reference", total, unit="answers") as advance:
        for number in range(-(-total // PART))[state.process_index :: state.num_processes]:
            rows = range(number * PART, min((number + 1) * PART, total))
            path = folder / f"part-{number:05d}.parquet"
            if tables.whole_part(path, [reading.ids[i] for i in rows]):
                advance(len(rows))
                continue
            values = token_values(policy, reading.said.take(rows), budget, recipe["numerics"]["compute"], advance)
            tables.write_part(path, _part(reading, rows, values), fingerprint)
    state.wait_for_everyone()
    if state.is_main_process:
        revision = getattr(policy.model.config, "_commit_hash", None)
        about = {"scorer": {"name": scorer, "revision": revision, "files": files}, "device": policy.device.type}
        tables.finish(folder, recipe, **about)
    state.wait_for_everyone()
    return load(folder)


def token_values(
    policy: Policy, said: Responses, budget: int, precision: Dtype, advance: Advance | None = None
) -> list[np.ndarray]:
    """log π(y_t | x, y_<t) of each text, (T,) float32, neighbors with the same prompt packed together."""
    training, prompts = policy.training, said.asked()
    runs = [list(run) for _, run in itertools.groupby(range(len(prompts)), key=prompts.__getitem__)]
    groups = [run[begin : begin + SIBLINGS] for run in runs for begin in range(0, len(run), SIBLINGS)]
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        values = score(policy, said, groups, budget=budget, progress=advance)
    policy.train(training)
    return [value.numpy() for value in said.split(values)]


def _part(reading: Reading, rows: range, values: list[np.ndarray]) -> pa.Table:
    """One part of the table; refuses what is not a number, so that none is ever stored."""
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
    return pa.table(columns, schema=tables.SCHEMA).append_column("token_logp", tokens)


# Import: log-probabilities that someone else computed ----------------------------------------------------------------


def given_sums(said: Responses, names: tuple[str, str]) -> np.ndarray:
    """The log-probabilities (2B,) that the rows of pairs bring along in two columns, chosen and rejected alternately.

    Raises BadReference (R1), naming the first, for a sum that is missing, not finite or positive.
    """
    sums, where = np.empty(len(said)), name_of(said)
    for i, p in enumerate(said.prompt.tolist()):
        value, holds = said.rows[p].get(names[i % 2]), f"R1: column {names[i % 2]!r} of {where(i)} holds"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadReference(f"{holds} {value!r:.40}; a number is needed, the log-probability in nats")
        if not (math.isfinite(value) and value <= POSITIVE):
            raise BadReference(f"{holds} {value}, which is no log-probability: it must be finite and at most 0")
        sums[i] = value
    return sums


def by_id(said: Responses, sums: np.ndarray) -> dict[str, float]:
    """The log-probability of each distinct answer. Raises BadReference (R1) for one with two."""
    found: dict[str, float] = {}
    for i, (name, value) in enumerate(zip(row_ids(said), sums.tolist(), strict=True)):
        if found.setdefault(name, value) != value:
            raise BadReference(f"R1: {name_of(said)(i)} has {value}, another row {found[name]} for the same answer")
    return found


def store(sums: Mapping[str, float], *, folder: Path, scorer: str, about: Mapping[str, Any]) -> ReferenceTable:
    """Log-probabilities, nats, by row_id, as a reference; about: where they came from, for the recipe.

    Nothing is known of tokenizer, template or truncation, so only losses of sums can use it. Raises BadReference (R7)
    if the folder is taken or cannot be written.
    """
    unknown = {"prompt_ids_sha": "", "resp_ids_sha": "", "n_prompt_tokens": -1, "n_resp_tokens": -1, "n_unknown": 0}
    unknown |= {"truncated": False, "prompt_truncated": False}
    rows = [{**unknown, "row_id": name, "sum_logp": value} for name, value in sums.items()]
    known = {"rows": len(sums), "sha256": tables.digest(sorted(sums))}
    recipe = {"imported": dict(about), "data": known, "tokens": False}
    if not tables.begin(folder, tables.digest(recipe)):
        part = pa.Table.from_pylist(rows, schema=tables.SCHEMA)
        tables.write_part(folder / "part-00000.parquet", part, tables.digest(recipe))
        tables.finish(folder, recipe, scorer={"name": scorer, "revision": None, "files": None})
    return load(folder)


# Rules that a reference must keep before a run may use it; each refusal names the rule and the first row -------------


def same_tokenizer(table: ReferenceTable, tokenizer: Any) -> bool:
    """Whether a reference was made with this tokenizer, so that its tokens are the trainer's."""
    return not table.imported and table.recipe["tokenizer"] == tables.tokenizer_hash(tokenizer)


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
    same = not table.imported and (tokenizer is None or same_tokenizer(table, tokenizer))
    if tokens and not same:
        raise BadReference(
            f"R3: {table.folder} was made with another tokenizer, so its tokens are not the policy's; "
            "use a loss of summed log-probabilities, such as dpo"
        )
    if tokens and table.token_logp is None:
        raise BadReference(f"R3: {table.folder} holds sums only and the loss reads tokens; compute it with tokens")
    reasons: list[str | None] = [None] * len(said)
    if said.truncated is not None:
        prior = not table.imported and table.recipe["conditioning"]["kind"] == "prior"
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
    """R2: an answer was read as the trainer's tokens, and its prompt too, if that is given."""
    other = tables.ids_hash(said) != table.resp_ids_sha[row]
    if other or (asked is not None and tables.ids_hash(asked) != table.prompt_ids_sha[row]):
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


# Obtain: what a trainer asked for, computed or found, checked, and mixed ---------------------------------------------


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
    beta and seed. tokens: token log-probabilities are needed. The result is None for "none"; it is not `aligned` if a
    part of it is known by sums alone. What it returns for pairs that must be dropped means nothing.

    Raises BadReference, naming the rule, for a reference that cannot be used, also (R8) for "ema", which has none.
    """
    if any(source.kind == "none" for source in sources):
        return None, [None] * (len(said) // 2), []
    if any(source.kind == "ema" for source in sources):
        raise BadReference("R8: a reference that moves with the policy has no stored log-probabilities; run it along")
    tokenizer, aligned = policy.tokenizer, True
    total, by_text = np.zeros(len(said)), [np.zeros(length, np.float32) for length in said.lengths.tolist()]
    reasons: list[str | None] = [None] * len(said)
    notes: list[str] = []
    for source in sources:
        if source.kind == "column":
            sums, why, aligned = _column(source, said, tokens=tokens), _cut_here(said), False
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
            why = verify(table, said, tokenizer=tokenizer, tokens=tokens, same_prompts=same_prompts)
            rows = table.rows(said)
            sums, aligned = table.sum_logp[rows], aligned and same_tokenizer(table, tokenizer)
            notes += _remarks(source, table, tokenizer)
            if tokens:
                for mine, values in zip(by_text, map(table.tokens, rows), strict=True):
                    if len(values) == len(mine):  # another length is that of an answer which is dropped
                        mine += np.float32(source.weight) * values
        total = total + source.weight * sums
        reasons = [before or now for before, now in zip(reasons, why, strict=True)]
    dropped = [chosen or rejected for chosen, rejected in zip(reasons[::2], reasons[1::2], strict=True)]
    weight = sum(source.weight for source in sources)
    if not math.isclose(weight, 1):
        notes.append(f"the weights of the reference add up to {weight:g}, not 1: it is no distribution")
    if tokens:
        logps = Logps.from_tokens([torch.as_tensor(row) for row in by_text])
    else:
        logps = Logps.from_sums(torch.as_tensor(total).float(), said.lengths, aligned=aligned)
    return logps, dropped, [*notes, _margins_line(logps, dropped)]


def _cut_here(said: Responses) -> list[str | None]:
    assert said.truncated is not None  # the trainer has read them
    return ["R3: truncation cut the answer for the policy" if cut else None for cut in said.truncated.tolist()]


def _column(source: RefSource, said: Responses, *, tokens: bool) -> np.ndarray:
    """Log-probabilities the user's data bring along: sums, of unknown tokens."""
    if tokens:
        raise BadReference("R3: a column holds sums only and the loss reads tokens; use a loss of sums, such as dpo")
    named = [(source.options.get("chosen", c), source.options.get("rejected", r)) for c, r in COLUMNS]
    row = said.rows[int(said.prompt[0])]
    return given_sums(said, next((both for both in named if all(name in row for name in both)), named[0]))


def _named(source: RefSource, said: Responses, policy: Policy, *, tokens: bool, precision: Dtype) -> ReferenceTable:
    """A finished reference the user names; one that claims to be of this very policy is computed again in part (R6)."""
    table = load(str(source.path), tokens=tokens)
    say(f"reference: reused {table.folder}, {len(table)} rows, no model needed")
    if not table.imported and table.recipe["weights"] == tables.weights_hash(policy.model):
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
    kin = tables.tokenizer_hash(theirs) == tables.tokenizer_hash(policy.tokenizer)
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
    files = tables.files_hash(path) if path else None
    wanted: dict[str, Any] = {"numerics": tables.arithmetic(dtype=dtype, precision=precision)}
    found = _in_cache(cache, reading, wanted, tokens=tokens, files=files) if files else None
    if found is None:
        scorer = Policy.load(path, dtype=dtype) if path else policy
        recipe = recipe_of(scorer, reading, precision=precision)
        found = _in_cache(cache, reading, {key: recipe[key] for key in ("weights", "numerics")}, tokens=tokens)
        if found is None:
            folder, begin = cache / tables.digest(recipe)[:16], time.monotonic()
            table = compute(scorer, reading, recipe, folder=folder, scorer=name, files=files)
            took = time.monotonic() - begin
            say(f"reference: computed {len(table)} rows of {name} in {took:.1f} s, kept in {folder}")
            return table, alike or not kin
    say(f"reference: reused {found}, no forward pass")
    return load(found, tokens=tokens), alike or not kin


def context_of_files(path: str | Path) -> int:
    """Longest sequence of a model in tokens, from its settings alone."""
    folder = checkpoints.place(path)
    settings = checkpoints.config(checkpoints.place(checkpoints.base_name(folder) or folder)).get_text_config()
    return int(getattr(settings, "max_position_embeddings", None) or 1 << 30)


def _in_cache(
    cache: Path, reading: Reading, wanted: Mapping[str, Any], *, tokens: bool, files: str | None = None
) -> Path | None:
    """A finished reference with this recipe that has all the texts, the same for every process."""
    found: list[Path | None] = [None]
    if world().is_main_process:
        recipe = {**reading.recipe, **wanted}
        folders = sorted(path.parent for path in cache.glob(f"*/{tables.MANIFEST}"))
        found[0] = next((one for one in folders if _serves(one, reading, recipe, tokens, files)), None)
    broadcast_object_list(found)
    return found[0]


def _serves(folder: Path, reading: Reading, recipe: Mapping[str, Any], tokens: bool, files: str | None) -> bool:
    try:
        manifest = tables.read_manifest(folder)
    except BadReference:
        return False  # not ours
    there = manifest["recipe"]
    if "imported" in there or not _within(recipe, there) or (tokens and not there["tokens"]):
        return False
    if files and manifest["scorer"]["files"] != files:
        return False
    if there["data"] == reading.data:
        return True
    table = load(folder, tokens=False)
    ids = dict(zip(table.row_id, zip(table.prompt_ids_sha, table.resp_ids_sha, strict=True), strict=True))
    return all(ids.get(name) == both for name, both in zip(reading.ids, reading.hashes, strict=True))


def _within(wanted: Mapping[str, Any], there: Mapping[str, Any]) -> bool:
    """Whether all that is wanted is there."""
    return all(
        _within(value, there.get(name) or {}) if isinstance(value, Mapping) else there.get(name) == value
        for name, value in wanted.items()
    )


def _remarks(source: RefSource, table: ReferenceTable, tokenizer: Any) -> list[str]:
    """What a user should know about one source."""
    if table.imported:
        return [f"{source} was imported: what was read is not known, only that its sums belong to these texts"]
    remarks, conditioning = [], table.recipe["conditioning"]
    if not same_tokenizer(table, tokenizer):
        remarks.append(f"{source} has another tokenizer: sums are compared, on answers that both read whole")
    elif table.recipe["template"]["sha256"] != tables.template_hash(tokenizer):
        remarks.append(f"{source} reads prompts in its own chat template, which is not the policy's")
    if conditioning["kind"] == "prior":
        remarks.append(f"{source} scores answers without their prompts, after {conditioning['header']!r}")
    return remarks


def _margins_line(logps: Logps, dropped: Sequence[str | None]) -> str:
    """R9: the margins of the pairs that are kept, in a line."""
    kept = torch.tensor([reason is None for reason in dropped]).repeat_interleave(2)
    if not kept.any():
        return "reference margins: no pair is left"
    seen = margins(logps.sum[kept].double().numpy())
    quantiles = ", ".join(f"{seen[name]:.3g}" for name in ("q05", "q25", "q50", "q75", "q95"))
    spread = f"mean {seen['mean']:.4g}, sd {seen['sd']:.4g} nats, quantiles 5 25 50 75 95 %: {quantiles}"
    return f"reference margins: {spread}; it ranks chosen first in {seen['accuracy']:.1%} of the pairs"
