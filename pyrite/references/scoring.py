"""Compute a reference: score texts with any model, in its own tokens and template, into a file that can be trusted.

log π_ref(y | x) = Σ_t log π_ref(y_t | x, y_<t) over the answer's tokens, its end token included, in nats
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pyrite import runs
from pyrite.loading import Dtype
from pyrite.models import Policy
from pyrite.packing import Row, micro_batches
from pyrite.processes import world
from pyrite.progress import Advance, progress
from pyrite.references import identity, tables
from pyrite.references.identity import Conditioning
from pyrite.references.readings import Reading, limits, read
from pyrite.references.tables import BadReference, Table, Text, row_id
from pyrite.text import Encoded

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
