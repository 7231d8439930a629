"""Give a trainer its reference: computed or found, checked, and mixed.

log π_ref(y | x) = Σ_k weight_k · log π_k(y | x)
"""

from __future__ import annotations

import csv
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import broadcast_object_list

from pyrite.core import runs
from pyrite.core.processes import Advance, progress, say, world
from pyrite.data import rows as data
from pyrite.data.files import DataError
from pyrite.data.text import Encoded, plain
from pyrite.math import seeds
from pyrite.math.logps import Logps
from pyrite.models.loading import Dtype, backbone, tokenizer_of
from pyrite.models.packing import Row, micro_batches
from pyrite.models.policy import Policy
from pyrite.models.references import identity, tables
from pyrite.models.references.identity import Conditioning, Reading, limits, read
from pyrite.models.references.tables import BadReference, Source, Table, Text, row_id

# scoring: Compute a reference: score texts with any model, in its own tokens and template, into a file that can be
# trusted.


PART = 1024  # rows in a part: what an interruption can cost
SIBLINGS = 64  # answers that share their prompt in one packed row


def compute(
    policy: Policy,
    texts: Sequence[Text],
    *,
    folder: Path,
    scorer: str,
    conditioning: Conditioning = "prompt",
    tokens: bool = True,
    max_length: int | None = None,
    max_prompt: int | None = None,
    budget: int = 16384,
    precision: Dtype = "float32",
) -> Table:
    """Score `texts` with a model and store them in `folder`; an interrupted computation goes on where it stopped.

    Lengths in tokens: the model's context, and three quarters of it for a prompt, by default. conditioning="prior"
    scores the answers without their prompts, after `identity.prior_prompt`. tokens: also store token
    log-probabilities. Equal texts are scored once. Raises ValueError for a text that cannot be read, BadReference
    where the folder holds another reference or cannot be written (R7), or the model gives no number (R1).
    """
    most, most_prompt = limits(policy.context, max_length, max_prompt)
    reading = read(policy.tokenizer, texts, conditioning=conditioning, max_length=most, max_prompt=most_prompt)
    recipe = recipe_of(policy, reading, tokens=tokens, precision=precision)
    return score(policy, reading, recipe, folder=folder, scorer=scorer, pairs=texts, budget=budget)


def recipe_of(policy: Policy, reading: Reading, *, tokens: bool, precision: Dtype) -> dict[str, Any]:
    """Everything that decides the numbers of a reference; its digest is the fingerprint, known before scoring."""
    return {**reading.recipe, **identity.scoring(policy, precision=precision), "data": reading.data, "tokens": tokens}


def score(
    policy: Policy,
    reading: Reading,
    recipe: Mapping[str, Any],
    *,
    folder: Path,
    scorer: str,
    pairs: Sequence[Text] = (),
    files: str | None = None,
    budget: int = 16384,
) -> Table:
    """The second half of `compute`: score what was read by its recipe; parts are dealt out to the processes.

    pairs: chosen and rejected texts alternately, whose margins the manifest then describes.
    """
    if (folder / tables.MANIFEST).exists():
        return _finished(folder, recipe)
    _begin(folder, recipe)
    state, precision = world(), recipe["numerics"]["compute"]
    begins = range(0, len(reading.ids), PART)
    with progress("reference", len(reading.ids), unit="answers") as advance:
        for number in range(len(begins))[state.process_index :: state.num_processes]:
            rows = range(begins[number], min(begins[number] + PART, len(reading.ids)))
            path = folder / f"part-{number:05d}.parquet"
            if tables.whole_part(path, [reading.ids[i] for i in rows]):
                advance(len(rows))
                continue
            values = token_logps(policy, [reading.encoded[i] for i in rows], budget, precision, advance)
            tables.write_part(path, _part(reading, rows, values, tokens=recipe["tokens"]))
    state.wait_for_everyone()
    if state.is_main_process:
        revision = getattr(policy.model.config, "_commit_hash", None)
        about = {"scorer": {"name": scorer, "revision": revision, "files": files}, "device": policy.device.type}
        tables.finish(folder, recipe, **about, margins=_margins(folder, reading, pairs))
    state.wait_for_everyone()
    return tables.load(folder)


@torch.no_grad()
def token_logps(
    policy: Policy, encoded: Sequence[Encoded], budget: int, precision: Dtype, advance: Advance | None = None
) -> list[np.ndarray]:
    """log π(y_t | x, y_<t) of each text, (T,) float32, neighbors with the same prompt in one packed row."""
    training = policy.training
    policy.eval()
    rows, members = _rows(encoded)
    found: list[np.ndarray] = [np.empty(0, np.float32)] * len(encoded)
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        for group in micro_batches(rows, budget=budget):
            batch = policy.pack([rows[g] for g in group])
            index = [i for g in group for i in members[g]]
            values = policy(batch).float().cpu().split(batch.lengths.tolist())
            for i, value in zip(index, values, strict=True):
                found[i] = value.numpy()
            if advance:
                advance(len(index))
    policy.train(training)
    return found


def _rows(encoded: Sequence[Encoded]) -> tuple[list[Row], list[list[int]]]:
    rows, members = [], []
    for prompt, run in itertools.groupby(range(len(encoded)), key=lambda i: encoded[i].prompt):
        members_of = list(run)
        for begin in range(0, len(members_of), SIBLINGS):
            some = members_of[begin : begin + SIBLINGS]
            rows.append(Row(prompt, [encoded[i].response for i in some]))
            members.append(some)
    return rows, members


def _part(reading: Reading, rows: range, values: list[np.ndarray], *, tokens: bool) -> pa.Table:
    """One part of the table; refuses what is not a number, so that none is ever stored."""
    sums = np.array([value.sum(dtype=np.float64) for value in values])
    if not np.isfinite(sums).all():
        bad = rows[int((~np.isfinite(sums)).argmax())]
        raise BadReference(
            f"R1: {reading.where[bad]}: the model gives {sums[bad - rows[0]]}; is it sound, in this dtype?"
        )
    end = reading.recipe["template"]["end_token"][0]
    some = [reading.encoded[i] for i in rows]
    columns: dict[str, Any] = {
        "row_id": [reading.ids[i] for i in rows],
        "prompt_ids_sha": [reading.hashes[i][0] for i in rows],
        "resp_ids_sha": [reading.hashes[i][1] for i in rows],
        "n_prompt_tokens": [len(one.prompt) for one in some],
        "n_resp_tokens": [len(one.response) for one in some],
        "n_unknown": [0 if reading.unknown is None else one.response.count(reading.unknown) for one in some],
        "resp_utf8_bytes": [len(reading.texts[i].response.encode("utf-8", "surrogatepass")) for i in rows],
        "ended_with_eos": [one.response[-1:] == [end] for one in some],
        "truncated": [one.truncated for one in some],
        "prompt_truncated": [reading.cut[i] for i in rows],
        "sum_logp": sums,
    }
    table = pa.table(columns, schema=tables.SCHEMA)
    if not tokens:
        return table
    begins = np.cumsum([0, *map(len, values)]).astype(np.int32)
    flat = np.concatenate(values) if values else np.empty(0, np.float32)
    return table.append_column("token_logp", pa.ListArray.from_arrays(pa.array(begins), pa.array(flat)))


def _margins(folder: Path, reading: Reading, pairs: Sequence[Text]) -> dict[str, Any] | None:
    """Statistics of the margins of pairs, chosen and rejected alternately."""
    if not pairs or len(pairs) % 2:
        return None
    sums: dict[str, float] = {}
    for path in sorted(folder.glob("part-*.parquet")):
        part = pq.read_table(path, columns=["row_id", "sum_logp"])
        sums |= zip(part["row_id"].to_pylist(), part["sum_logp"].to_pylist(), strict=True)
    return tables.margins(np.array([sums[row_id(one)] for one in pairs]))


def _begin(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Note what is being computed, so that parts of another computation are never taken for it."""
    plan, mine = folder / tables.PLAN, tables.digest(recipe)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if world().is_main_process and not plan.exists():
            runs.write_json(plan, {"fingerprint": mine})
    except OSError as error:
        raise tables.unwritable(folder, error) from error
    world().wait_for_everyone()
    if runs.read_json(plan)["fingerprint"] != mine:
        raise BadReference(f"R7: {folder} holds an unfinished reference of something else; delete it or choose another")


def _finished(folder: Path, recipe: Mapping[str, Any]) -> Table:
    table = tables.load(folder)
    if table.manifest["fingerprint"] != tables.digest(recipe):
        raise BadReference(f"R7: {folder} holds another reference already; delete it or choose another folder")
    return table


# rules: The rules a reference must keep before a run may use it; each refusal names the rule and the first row.


POSITIVE = 1e-3  # nats; a sum of float32 log-probabilities may round to slightly above 0
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # nats a token between two computations of one row

Where = Callable[[int], str]


def same_tokenizer(table: Table, tokenizer: Any) -> bool:
    """Whether a reference was made with this tokenizer, so that its tokens are the trainer's."""
    return not table.imported and table.recipe["tokenizer"] == identity.tokenizer_hash(tokenizer)


def verify(
    table: Table,
    texts: Sequence[Text],
    encoded: Sequence[Encoded] | None = None,
    *,
    tokenizer: Any = None,
    tokens: bool = False,
    own_template: bool = False,
    where: Where | None = None,
) -> list[str | None]:
    """Why each of N texts must be dropped, None for those to keep.

    encoded: the texts as the trainer reads them, with its tokenizer; a reference of that tokenizer must have read the
    same ids (R2), one of another must have scored the same whole text (R3, otherwise the text is dropped).
    Without `tokenizer`, `encoded` is taken to be of the reference's own. tokens: token log-probabilities are needed.
    own_template: prompts may have been read in another chat template (as those of a prior are).
    Raises BadReference, naming the rule and the first row, where the reference cannot be used.
    """
    name = where or (lambda i: f"text {i + 1} ({plain(texts[i].prompt)[:40]!r})")
    rows = _found(table, texts, name)
    reasons: list[str | None] = [None] * len(texts)
    same = not table.imported and (tokenizer is None or same_tokenizer(table, tokenizer))
    _check_tokens(table, same, tokens)
    if encoded is not None:
        prior = not table.imported and table.recipe["conditioning"]["kind"] == "prior"
        exact = same and not own_template
        if not exact:
            cut = (
                [False] * len(texts) if prior or tokenizer is None else identity.cut_prompts(tokenizer, texts, encoded)
            )
            reasons = [_cut(table, *sides, lossless=same) for sides in zip(rows, texts, encoded, cut, strict=True)]
        if same:
            _check_ids(table, rows, encoded, reasons, name, prompts=exact and not prior)
    none = "R4: the answer has no tokens"
    return [none if table.n_resp_tokens[row] == 0 else why for row, why in zip(rows, reasons, strict=True)]


def spot_check(table: Table, policy: Policy, texts: Sequence[Text], *, rows: int = 32, seed: int = 0) -> float:
    """R6: random rows computed again by the scorer; the largest difference, nats.

    Raises BadReference where a row differs by more than 1e-3 · max(1, T) nats over T tokens in float32 (2e-2 in
    bfloat16): another model, template or arithmetic, or a changed file.
    """
    pick = torch.randperm(len(texts), generator=seeds.generator(seed, "spot check"))[:rows].tolist()
    some, numerics, limits = [texts[i] for i in pick], table.recipe["numerics"], table.recipe["truncation"]
    reading = identity.read(
        policy.tokenizer,
        some,
        conditioning=table.recipe["conditioning"]["kind"],
        max_length=limits["max_length"],
        max_prompt=limits["max_prompt"],
    )
    values = token_logps(policy, reading.encoded, 16384, numerics["compute"])
    coarse = "bfloat16" if "bfloat16" in (numerics["weights"], numerics["compute"]) else "float32"
    worst = 0.0
    for one, name, value in zip(reading.texts, reading.ids, values, strict=True):
        stored, now = float(table.sum_logp[table.places[name]]), float(value.sum(dtype=np.float64))
        allowed = TOLERANCE[coarse] * max(1, len(value))
        if not abs(stored - now) <= allowed:
            raise BadReference(
                f"R6: {table.folder}: the answer {one.response[:40]!r} to {plain(one.prompt)[:40]!r} has {stored:.4f} "
                f"nats there and {now:.4f} now (allowed: {allowed:.3f}); another model, template or precision made it"
            )
        worst = max(worst, abs(stored - now))
    return worst


def _found(table: Table, texts: Sequence[Text], name: Where) -> list[int]:
    """R1: the row of every text."""
    rows = []
    for i, one in enumerate(texts):
        row = table.places.get(row_id(one))
        if row is None:
            raise BadReference(
                f"R1: {table.folder}: {name(i)} is not there; it was made from other data: compute it again"
            )
        value = table.sum_logp[row]
        if not (np.isfinite(value) and value <= POSITIVE):
            fault = "is no log-probability; it must be finite and at most 0"
            raise BadReference(f"R1: {table.folder}: {name(i)} has {value:g}, which {fault}: compute it again")
        rows.append(row)
    return rows


def _check_tokens(table: Table, same: bool, tokens: bool) -> None:
    if tokens and not same:
        raise BadReference(
            f"R3: {table.folder} was made with another tokenizer, so its tokens are not the policy's; "
            "use a loss of summed log-probabilities, such as dpo"
        )
    if tokens and table.token_logp is None:
        raise BadReference(f"R3: {table.folder} holds sums only and the loss reads tokens; compute it with tokens")


def _check_ids(
    table: Table,
    rows: Sequence[int],
    encoded: Sequence[Encoded],
    reasons: Sequence[str | None],
    name: Where,
    *,
    prompts: bool,
) -> None:
    """R2: the ids of every answer that is kept, and of its prompt where that was read in the same way."""
    for i, (row, ours) in enumerate(zip(rows, encoded, strict=True)):
        other = identity.ids_hash(ours.response) != table.resp_ids_sha[row]
        if reasons[i] is None and (other or (prompts and identity.ids_hash(ours.prompt) != table.prompt_ids_sha[row])):
            counts, mine = (table.n_resp_tokens, ours.response) if other else (table.n_prompt_tokens, ours.prompt)
            raise BadReference(
                f"R2: {table.folder}: {'' if other else 'the prompt of '}{name(i)} was read as other tokens "
                f"({counts[row]}) than the policy's ({len(mine)}): another truncation or chat template; compute it "
                "again with the policy's, or name it PATH(own_template=True) if that is meant"
            )


def _cut(table: Table, row: int, one: Text, ours: Encoded, cut: bool, *, lossless: bool) -> str | None:
    """R3: both models must have scored the whole text; row_id already says that it is the same one."""
    if ours.truncated or table.truncated[row]:
        return "R3: truncation cut the answer for the policy or the reference"
    if cut or table.prompt_truncated[row]:
        return "R3: truncation cut the prompt for the policy or the reference"
    if not lossless and table.n_unknown[row]:
        return "R3: the tokenizer of the reference does not know part of the answer"
    if table.resp_utf8_bytes[row] != len(one.response.encode("utf-8", "surrogatepass")):
        return "R3: policy and reference scored other texts"
    return None


# imports: Take in log-probabilities that someone else computed: one sum an answer, as RefDPO published them.


SIDES = ("chosen", "rejected")
NAMES = ("chosen_logprob", "rejected_logprob")


@dataclass(frozen=True)
class Sums:
    """What a file says of 2B answers, chosen and rejected alternately: texts, sums in nats, and how they were read."""

    texts: list[Text]
    values: list[float]
    about: dict[str, Any]


def import_table(
    file: str | Path,
    *,
    folder: Path,
    scorer: str,
    names: tuple[str, str] = NAMES,
    columns: str | None = None,
    note: Callable[[str], object] | None = None,
) -> Table:
    """Pairs with the summed log-probabilities of both answers, nats, as a reference in `folder`.

    file: prompt, chosen, rejected and the two sums, as JSONL, CSV, Parquet or a data set that `data.load` reads;
    `columns` renames its columns, `names` are those of the sums. The manifest says that it was imported: nothing is
    known of tokenizer, template or truncation, so only losses of sums can use it.
    Raises BadReference (R1), naming the first row, for a sum that is missing, not finite or positive.
    """
    return store(imports_read(file, names=names, columns=columns, note=note), folder=folder, scorer=scorer)


def imports_read(
    file: str | Path,
    *,
    names: tuple[str, str] = NAMES,
    columns: str | None = None,
    note: Callable[[str], object] | None = None,
) -> Sums:
    """The first half of `import_table`: read and check, write nothing."""
    seen: dict[str, float] = {}
    texts, values = [], []
    for text, value, where in _values(str(file), names, columns, note):
        if seen.setdefault(row_id(text), value) != value:
            raise BadReference(f"R1: {where} is {value}, another row has {seen[row_id(text)]} for the same answer")
        texts.append(text)
        values.append(value)
    sha256 = tables.file_hash(Path(file)) if Path(file).is_file() else None
    return Sums(texts, values, {"file": Path(file).name, "sha256": sha256, "names": list(names)})


def store(sums: Sums, *, folder: Path, scorer: str) -> Table:
    """The second half of `import_table`. Raises BadReference (R7) where the folder is taken or cannot be written."""
    if (folder / tables.MANIFEST).exists():
        raise BadReference(f"R7: {folder} holds a reference already; delete it or choose another folder")
    by_id = {row_id(text): (text, value) for text, value in zip(sums.texts, sums.values, strict=True)}
    recipe = {
        "imported": sums.about,
        "reduction": "sum",
        "data": {"rows": len(by_id), "sha256": tables.digest(sorted(by_id))},
        "tokens": False,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise tables.unwritable(folder, error) from error
    tables.write_part(folder / tables.FIRST_PART, _imports_part(by_id))
    about = {"name": scorer, "revision": None, "files": None}
    tables.finish(folder, recipe, scorer=about, margins=tables.margins(np.array(sums.values)))
    return tables.load(folder)


def _values(
    file: str, names: tuple[str, str], columns: str | None, note: Callable[[str], object] | None
) -> Iterator[tuple[Text, float, str]]:
    """Chosen and rejected alternately, their sums, and where they stand."""
    for number, row in enumerate(_imports_rows(file, columns, note), 1):
        for side, name in zip(SIDES, names, strict=True):
            where = f"{file}: {name} of pair {number} (prompt {row['prompt_id']})"
            value = row.get(name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise BadReference(f"R1: {where} is {value!r:.40}; a number is needed, the log-probability in nats")
            if not (math.isfinite(value) and value <= POSITIVE):
                raise BadReference(f"R1: {where} is {value}; a log-probability is finite and at most 0")
            yield Text(row["prompt"], row[side]), float(value), where


def _imports_rows(file: str, columns: str | None, note: Callable[[str], object] | None) -> list[dict[str, Any]]:
    try:
        if file.endswith(".csv"):
            return list(_from_csv(file, columns))
        return data.load(file, "pairs", columns=columns, on_equal="drop", note=note)
    except (DataError, OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadReference(f"R1: {' '.join(str(error).split())}") from error


def _from_csv(file: str, columns: str | None) -> Iterator[dict[str, Any]]:
    """Rows of texts and numbers; what is no number stays text, and is refused with its place."""
    theirs = {
        ours.strip(): name.strip() for ours, _, name in (one.partition("=") for one in (columns or "").split(","))
    }
    with Path(file).open(newline="", encoding="utf-8-sig") as stream:
        for row in csv.DictReader(stream):
            named = {ours: row.pop(name) for ours, name in theirs.items() if name in row} | row
            missing = [name for name in ("prompt", *SIDES) if not named.get(name)]
            if missing:
                raise DataError(
                    f"{file} has a row without {missing[0]}; CSV needs prompt, chosen, rejected and the sums"
                )
            yield {name: _number(text) for name, text in named.items()} | {
                "prompt_id": data.prompt_id(named["prompt"]),
                **{name: named[name] for name in ("prompt", *SIDES)},
            }


def _number(text: Any) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def _imports_part(by_id: dict[str, tuple[Text, float]]) -> pa.Table:
    """What is known of imported rows; how they were read is not."""
    unknown = {"n_prompt_tokens": -1, "n_resp_tokens": -1, "n_unknown": 0, "ended_with_eos": True}
    unknown |= {"prompt_ids_sha": "", "resp_ids_sha": "", "truncated": False, "prompt_truncated": False}
    rows = [
        {
            **unknown,
            "row_id": name,
            "resp_utf8_bytes": len(text.response.encode("utf-8", "surrogatepass")),
            "sum_logp": value,
        }
        for name, (text, value) in by_id.items()
    ]
    return pa.Table.from_pylist(rows, schema=tables.SCHEMA)


# cache: The file of a model: found in the cache, by the model's files or its weights, or computed now.


@dataclass(frozen=True)
class Trainer:
    """Who asks: the policy before training, where it came from, and what its loss needs.

    limits: longest text and longest prompt in tokens. tokens: token log-probabilities are needed. rows: of the pairs.
    """

    policy: Policy
    path: str
    limits: tuple[int, int]
    tokens: bool
    precision: Dtype
    cache: Path
    budget: int
    rows: Sequence[dict[str, Any]] | None = None


def model_table(
    source: Source, texts: Sequence[Text], trainer: Trainer, *, encoded: Sequence[Encoded] | None = None
) -> tuple[Table, bool]:
    """The file of a model, and whether it reads the policy's tokens in a way of its own (template, limits).

    Found where a finished one has the same recipe and all the texts: first by the model's files, so that it need not
    be loaded, then by its weights. encoded: the texts as the trainer reads them, which a model that reads alike need
    not do again.
    """
    path, reading, own = source.path, *_read(source, texts, trainer, encoded)
    kin = reading.recipe["tokenizer"] == identity.tokenizer_hash(trainer.policy.tokenizer)
    dtype: Dtype = source.options.get("dtype") or dtype_of(trainer.policy)
    files = identity.files_hash(path) if path else None
    wanted: dict[str, Any] = {"numerics": identity.arithmetic(dtype=dtype, precision=trainer.precision)}
    found = _cached(trainer, reading, wanted, files=files) if files else None
    if found is None:
        scorer = Policy.load(path, dtype=dtype) if path else trainer.policy
        recipe = recipe_of(scorer, reading, tokens=kin, precision=trainer.precision)
        found = _cached(trainer, reading, {name: recipe[name] for name in ("weights", "numerics")})
        if found is None:
            return _computed(scorer, reading, recipe, texts, trainer, path=path, files=files), own
    say(f"reference: reused {found}, no forward pass")
    return tables.load(found, tokens=trainer.tokens), own


def dtype_of(policy: Policy) -> Dtype:
    """Of the weights."""
    return "bfloat16" if backbone(policy.model).dtype == torch.bfloat16 else "float32"


def place(texts: Sequence[Text], rows: Sequence[dict[str, Any]] | None = None) -> Callable[[int], str]:
    """How errors call the answers of pairs: with file and line where their rows know them, else with the prompt."""

    def name(i: int) -> str:
        asked = repr(plain(texts[i].prompt)[:40])
        named = data.place(rows[i // 2], asked) if rows else asked
        return f"the {('chosen', 'rejected')[i % 2]} answer of pair {i // 2 + 1} ({named})"

    return name


def _read(
    source: Source, texts: Sequence[Text], trainer: Trainer, encoded: Sequence[Encoded] | None
) -> tuple[Reading, bool]:
    """Like the policy, where the model can; otherwise in its own way, with all the room it has."""
    policy = trainer.policy
    tokenizer = tokenizer_of(source.path) if source.path else policy.tokenizer
    context = identity.context(source.path) if source.path else policy.context
    kin = identity.tokenizer_hash(tokenizer) == identity.tokenizer_hash(policy.tokenizer)
    same = kin and tokenizer.chat_template == policy.tokenizer.chat_template
    tokenizer = policy.tokenizer if same else tokenizer  # with the run's template arguments, and its ends
    alike = same and context >= trainer.limits[0]
    most, most_prompt = trainer.limits if alike else identity.limits(context, None, None)
    conditioning: Conditioning = "prior" if source.kind == "prior" else "prompt"
    reading = identity.read(
        tokenizer,
        texts,
        conditioning=conditioning,
        max_length=most,
        max_prompt=most_prompt,
        where=place(texts, trainer.rows),
        encoded=encoded if alike else None,
    )
    return reading, kin and not alike


def _computed(
    scorer: Policy,
    reading: Reading,
    recipe: Mapping[str, Any],
    texts: Sequence[Text],
    trainer: Trainer,
    *,
    path: str | None,
    files: str | None,
) -> Table:
    folder, name, begin = trainer.cache / tables.digest(recipe)[:16], path or trainer.path, time.monotonic()
    table = score(scorer, reading, recipe, folder=folder, scorer=name, pairs=texts, files=files, budget=trainer.budget)
    say(f"reference: computed {len(table)} rows of {name} in {time.monotonic() - begin:.1f} s, kept in {folder}")
    return table


def _cached(trainer: Trainer, reading: Reading, wanted: Mapping[str, Any], *, files: str | None = None) -> Path | None:
    """A finished reference with this recipe that has all the texts, the same for every process."""
    found: list[Path | None] = [None]
    if world().is_main_process:
        recipe = {**reading.recipe, **wanted}
        found[0] = next(
            (f for f in _cache_finished(trainer.cache) if _serves(f, reading, recipe, trainer.tokens, files)), None
        )
    broadcast_object_list(found)
    return found[0]


def _cache_finished(cache: Path) -> list[Path]:
    return sorted(path.parent for path in cache.glob(f"*/{tables.MANIFEST}"))


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
    table = tables.load(folder, tokens=False)
    read = dict(zip(table.row_id, zip(table.prompt_ids_sha, table.resp_ids_sha, strict=True), strict=True))
    return all(read.get(name) == ids for name, ids in zip(reading.ids, reading.hashes, strict=True))


def _within(wanted: Mapping[str, Any], there: Mapping[str, Any]) -> bool:
    """Whether all that is wanted is there."""
    return all(
        _within(value, there.get(name) or {}) if isinstance(value, Mapping) else there.get(name) == value
        for name, value in wanted.items()
    )


# supply: Give a trainer its reference: computed or found, checked, and mixed.


COLUMNS = (NAMES, ("ref_chosen_logps", "ref_rejected_logps"))  # RefDPO's, TRL's


@dataclass(frozen=True)
class Piece:
    """One source's log-probabilities of N texts: sums (N,) float64, tokens by text where they are the trainer's."""

    sums: np.ndarray
    tokens: list[np.ndarray] | None
    aligned: bool
    reasons: list[str | None]
    notes: list[str]


def obtain(
    sources: Sequence[Source],
    texts: Sequence[Text],
    encoded: Sequence[Encoded],
    *,
    policy: Policy,
    policy_path: str,
    cache: Path,
    tokens: bool = False,
    max_length: int | None = None,
    max_prompt: int | None = None,
    columns: Sequence[dict[str, Any]] | None = None,
    precision: Dtype = "float32",
    budget: int = 16384,
) -> tuple[Logps | None, list[str | None], list[str]]:
    """Log-probabilities of 2B texts under a reference; why each of B pairs must be dropped, or None; notes.

    texts: chosen and rejected alternately, `encoded` as the trainer reads them, by the policy's tokenizer and these
    limits. The policy must be as it was before training. A model is scored once, into cache/<fingerprint>, and found
    there by every later run with the same scorer, data and reading, whatever its loss, beta and seed. columns: the
    rows of the pairs, for the source "column". tokens: token log-probabilities are needed. The result is None for
    "none"; it is not `aligned` where a part of it is known by sums alone. What it returns for pairs that must be
    dropped means nothing.

    Raises BadReference, naming the rule, for a reference that cannot be used, also (R8) for "ema", which has none.
    """
    if any(source.kind == "none" for source in sources):
        return None, [None] * (len(texts) // 2), []
    if any(source.kind == "ema" for source in sources):
        raise BadReference("R8: a reference that moves with the policy has no stored log-probabilities; run it along")
    if len(texts) != len(encoded) or not texts or len(texts) % 2:
        raise ValueError(f"{len(texts)} texts and {len(encoded)} encodings; give chosen and rejected of every pair")
    limits = identity.limits(policy.context, max_length, max_prompt)
    trainer = Trainer(
        policy, policy_path, limits, tokens=tokens, precision=precision, cache=cache, budget=budget, rows=columns
    )
    pieces = [_piece(source, texts, encoded, trainer, columns) for source in sources]
    weights = [source.weight for source in sources]
    reasons = [next((piece.reasons[i] for piece in pieces if piece.reasons[i]), None) for i in range(len(texts))]
    dropped = [chosen or rejected for chosen, rejected in zip(reasons[::2], reasons[1::2], strict=True)]
    logps = _mixed(pieces, weights, encoded, tokens=tokens)
    notes = [note for piece in pieces for note in piece.notes]
    if not math.isclose(sum(weights), 1):
        notes.append(f"the weights of the reference add up to {sum(weights):g}, not 1: it is no distribution")
    return logps, dropped, [*notes, describe(logps, dropped)]


def describe(logps: Logps, dropped: Sequence[str | None]) -> str:
    """R9: the margins of the pairs that are kept, in a line."""
    kept = torch.tensor([reason is None for reason in dropped]).repeat_interleave(2)
    if not kept.any():
        return "reference margins: no pair is left"
    seen = tables.margins(logps.sum[kept].double().numpy())
    quantiles = ", ".join(f"{seen[name]:.3g}" for name in ("q05", "q25", "q50", "q75", "q95"))
    spread = f"mean {seen['mean']:.4g}, sd {seen['sd']:.4g} nats, quantiles 5 25 50 75 95 %: {quantiles}"
    return f"reference margins: {spread}; it ranks chosen first in {seen['accuracy']:.1%} of the pairs"


def _piece(
    source: Source,
    texts: Sequence[Text],
    encoded: Sequence[Encoded],
    trainer: Trainer,
    columns: Sequence[dict[str, Any]] | None,
) -> Piece:
    if source.kind == "column":
        return _column(source, texts, encoded, columns, tokens=trainer.tokens)
    if source.kind == "table":
        table, own = _given(source, texts, trainer), bool(source.options.get("own_template"))
    else:
        table, own = model_table(source, texts, trainer, encoded=encoded)
    tokenizer = trainer.policy.tokenizer
    reasons = verify(
        table, texts, encoded, tokenizer=tokenizer, tokens=trainer.tokens, own_template=own, where=place(texts, columns)
    )
    rows = [table.places[row_id(one)] for one in texts]
    aligned = same_tokenizer(table, tokenizer)
    values = None
    if trainer.tokens:  # a text that is dropped may have been cut elsewhere: its tokens are not compared
        found = [table.tokens(row) for row in rows]
        lengths = [len(one.response) for one in encoded]
        values = [v if len(v) == n else np.zeros(n, np.float32) for v, n in zip(found, lengths, strict=True)]
    return Piece(table.sum_logp[rows], values, aligned, reasons, _remarks(source, table, trainer, aligned=aligned))


def _column(
    source: Source,
    texts: Sequence[Text],
    encoded: Sequence[Encoded],
    columns: Sequence[dict[str, Any]] | None,
    *,
    tokens: bool,
) -> Piece:
    """Log-probabilities the user's data bring along: sums, of unknown tokens."""
    if tokens:
        raise BadReference("R3: a column holds sums only and the loss reads tokens; use a loss of sums, such as dpo")
    if not columns:
        raise ValueError('ref "column" reads the log-probabilities from the pairs; give their rows')
    given = [(source.options.get("chosen", c), source.options.get("rejected", r)) for c, r in COLUMNS]
    names = next((pair for pair in given if all(name in columns[0] for name in pair)), given[0])
    sums = np.empty(len(texts))
    for i, (row, name) in enumerate((row, name) for row in columns for name in names):
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadReference(
                f"R1: column {name!r} of {place(texts, columns)(i)} holds {value!r:.40}; a number is needed"
            )
        if not (math.isfinite(value) and value <= POSITIVE):
            fault = "which is no log-probability: it must be finite and at most 0"
            raise BadReference(f"R1: column {name!r} of {place(texts, columns)(i)} holds {value}, {fault}")
        sums[i] = value
    cut = "R3: truncation cut the answer for the policy"
    return Piece(sums, None, False, [cut if one.truncated else None for one in encoded], [])


def _given(source: Source, texts: Sequence[Text], trainer: Trainer) -> Table:
    """A finished reference the user names; one that claims to be of this very policy is computed again in part (R6)."""
    table = tables.load(str(source.path), tokens=trainer.tokens)
    say(f"reference: reused {table.folder}, {len(table)} rows, no model needed")
    if not table.imported and table.recipe["weights"] == identity.weights_hash(trainer.policy.model):
        made = table.recipe["numerics"]["compute"]
        if made != trainer.precision:
            raise BadReference(
                f"R6: {table.folder} holds this policy's log-probabilities in {made}, and the policy is read in "
                f"{trainer.precision}, so margins would not begin at 0: use --ref self, or compute the reference again "
                f"with --precision {trainer.precision}"
            )
        known = [one for one in texts if row_id(one) in table.places]
        worst = spot_check(table, trainer.policy, known)
        say(f"reference: {min(32, len(known))} rows computed again, they differ by {worst:.2g} nats at most (R6)")
    return table


def _mixed(pieces: Sequence[Piece], weights: Sequence[float], encoded: Sequence[Encoded], *, tokens: bool) -> Logps:
    """The weighted sum of the pieces, float32 as the policy's own."""
    total = sum(weight * piece.sums for weight, piece in zip(weights, pieces, strict=True))
    length = torch.tensor([len(one.response) for one in encoded])
    if not tokens:
        aligned = all(piece.aligned for piece in pieces)
        return Logps.from_sums(torch.as_tensor(total).float(), length, aligned=aligned)
    by_text = zip(*(piece.tokens or [] for piece in pieces), strict=True)
    summed = (sum(weight * row for weight, row in zip(weights, rows, strict=True)) for rows in by_text)
    return Logps.from_tokens([torch.as_tensor(row, dtype=torch.float32) for row in summed])


def _remarks(source: Source, table: Table, trainer: Trainer, *, aligned: bool) -> list[str]:
    """What a user should know about one source."""
    remarks, conditioning = [], {} if table.imported else table.recipe["conditioning"]
    if table.imported:
        remarks.append(f"{source} was imported: what was read is not known, only that its sums belong to these texts")
    elif not aligned:
        remarks.append(f"{source} has another tokenizer: sums are compared, on answers that both read whole")
    elif table.recipe["template"]["sha256"] != identity.template_hash(trainer.policy.tokenizer):
        remarks.append(f"{source} reads prompts in its own chat template, which is not the policy's")
    if conditioning.get("kind") == "prior":
        remarks.append(f"{source} scores answers without their prompts, after {conditioning['header']!r}")
    return remarks
