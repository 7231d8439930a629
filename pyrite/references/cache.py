"""The file of a model: found in the cache, by the model's files or its weights, or computed now."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from pyrite import data
from pyrite.loading import Dtype, backbone, tokenizer_of
from pyrite.models import Policy
from pyrite.processes import world
from pyrite.progress import say
from pyrite.references import identity, readings, scoring, tables
from pyrite.references.identity import Conditioning
from pyrite.references.readings import Reading
from pyrite.references.sources import Source
from pyrite.references.tables import BadReference, Table, Text
from pyrite.text import Encoded, plain


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
        recipe = scoring.recipe_of(scorer, reading, tokens=kin, precision=trainer.precision)
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
    most, most_prompt = trainer.limits if alike else readings.limits(context, None, None)
    conditioning: Conditioning = "prior" if source.kind == "prior" else "prompt"
    reading = readings.read(
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
    table = scoring.score(
        scorer, reading, recipe, folder=folder, scorer=name, pairs=texts, files=files, budget=trainer.budget
    )
    say(f"reference: computed {len(table)} rows of {name} in {time.monotonic() - begin:.1f} s, kept in {folder}")
    return table


def _cached(trainer: Trainer, reading: Reading, wanted: Mapping[str, Any], *, files: str | None = None) -> Path | None:
    """A finished reference with this recipe that has all the texts, the same for every process."""
    found: list[Path | None] = [None]
    if world().is_main_process:
        recipe = {**reading.recipe, **wanted}
        found[0] = next(
            (f for f in _finished(trainer.cache) if _serves(f, reading, recipe, trainer.tokens, files)), None
        )
    broadcast_object_list(found)
    return found[0]


def _finished(cache: Path) -> list[Path]:
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
