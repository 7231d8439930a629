"""The rules a reference must keep: each kind of wrong file is refused with the rule's name and the first row."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pyrite.models import references
from pyrite.models.policy import Policy
from pyrite.models.references import BadReference, ReferenceTable, load, same_tokenizer, spot_check, verify

from .conftest import TEMPLATE, Text, compute, encode, id_of, said


@pytest.fixture
def table(policy: Policy, texts: list[Text], tmp_path: Path) -> ReferenceTable:
    return compute(policy, texts, folder=tmp_path / "table", scorer="me")


def rewritten(table: ReferenceTable, change, folder: Path) -> ReferenceTable:
    """The reference with its rows changed and its checksums made good again, as an attacker or a script would."""
    folder.mkdir()
    whole = change(pq.read_table(table.folder / "part-00000.parquet"))
    references.write_part(folder / "part-00000.parquet", whole, "")
    recipe = {**table.recipe, "data": {**table.recipe["data"], "rows": len(whole)}}
    references.finish(folder, recipe, scorer=table.manifest["scorer"])
    return load(folder)


def with_sum(value: float, row: int = 3):
    def change(whole: pa.Table) -> pa.Table:
        sums = whole["sum_logp"].to_pylist()
        sums[row] = value
        return whole.set_column(whole.column_names.index("sum_logp"), "sum_logp", pa.array(sums, pa.float64()))

    return change


def test_a_good_reference_keeps_every_row(table: ReferenceTable, policy: Policy, texts: list[Text]) -> None:
    encoded = encode(policy.tokenizer, texts)
    assert same_tokenizer(table, policy.tokenizer)
    for options in ({}, {"tokenizer": policy.tokenizer}, {"tokenizer": policy.tokenizer, "tokens": True}):
        assert verify(table, encoded, **options) == [None] * len(texts)
    assert verify(table, said(texts)) == [None] * len(texts)


def test_order_does_not_matter(table: ReferenceTable, policy: Policy, texts: list[Text], tmp_path: Path) -> None:
    mixed = np.random.default_rng(0).permutation(len(table))
    shuffled = rewritten(table, lambda whole: whole.take(pa.array(mixed)), tmp_path / "shuffled")
    assert shuffled.row_id != table.row_id
    assert verify(shuffled, encode(policy.tokenizer, texts), tokens=True) == [None] * len(texts)
    for one in texts:
        a, b = (t.places[id_of(one)] for t in (table, shuffled))
        assert table.sum_logp[a] == shuffled.sum_logp[b]
        assert (table.tokens(a) == shuffled.tokens(b)).all()


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf, 0.5])
def test_values_that_are_no_log_probabilities(
    value: float, table: ReferenceTable, texts: list[Text], tmp_path: Path
) -> None:
    bad = rewritten(table, with_sum(value), tmp_path / "bad")
    with pytest.raises(
        BadReference,
        match=rf"^R1: .*: the answer '{texts[3].answer}' to 'tell me .*' has .*, which is no log-probability",
    ):
        verify(bad, said(texts))


def test_missing_rows_and_other_data(table: ReferenceTable, texts: list[Text], tmp_path: Path) -> None:
    without = pa.array([i for i in range(len(table)) if i != 5])
    fewer = rewritten(table, lambda whole: whole.take(without), tmp_path / "fewer")
    with pytest.raises(BadReference, match=rf"^R1: .*: the answer '{texts[5].answer}' to .* is not there"):
        verify(fewer, said(texts))
    with pytest.raises(BadReference, match=r"^R1: .*: the answer 'a dog' to 'a cat' is not there; it was made"):
        verify(table, said([Text("a cat", "a dog")]))


def test_another_truncation(policy: Policy, texts: list[Text], table: ReferenceTable, tmp_path: Path) -> None:
    shorter = compute(policy, texts, folder=tmp_path / "short", scorer="me", max_length=16, max_prompt=12)
    encoded = encode(policy.tokenizer, texts)
    with pytest.raises(BadReference, match=r"^R2: .*: the answer .* was read as other tokens \(\d+\) .* truncation"):
        verify(shorter, encoded)
    assert verify(shorter, encode(policy.tokenizer, texts, max_length=16, max_prompt=12)) == [None] * len(texts)
    prompts = compute(policy, texts, folder=tmp_path / "prompts", scorer="me", max_prompt=5)
    with pytest.raises(BadReference, match=r"^R2: .*: the prompt of the answer .* was read as other tokens \(5\)"):
        verify(prompts, encoded)


def test_another_template(policy: Policy, texts: list[Text], table: ReferenceTable) -> None:
    other = copy.deepcopy(policy.tokenizer)
    other.chat_template = TEMPLATE
    encoded = encode(other, texts)
    with pytest.raises(BadReference, match=rf"^R2: .*: the prompt of the answer '{texts[0].answer}' .* chat template"):
        verify(table, encoded, tokenizer=other)
    assert verify(table, encoded, tokenizer=other, same_prompts=False) == [None] * len(texts)


def test_with_its_own_template_cut_answers_are_dropped(policy: Policy, tmp_path: Path) -> None:
    texts = [Text("a cat", "a dog"), Text("a cat", "a " * 9), Text("a " * 9, "a dog")]
    table = compute(policy, texts, folder=tmp_path, scorer="me", max_length=32)
    policy.tokenizer.chat_template = TEMPLATE
    encoded = encode(policy.tokenizer, texts, max_length=14, max_prompt=10)
    kept, answer, prompt = verify(table, encoded, tokenizer=policy.tokenizer, same_prompts=False)
    assert kept is None
    assert answer is not None
    assert answer.startswith("R3: truncation cut the answer")
    assert prompt is not None
    assert prompt.startswith("R3: truncation cut the prompt")


def test_another_tokenizer_gives_sums_of_whole_texts(policy: Policy, foreign: Path, tmp_path: Path) -> None:
    reader = Policy.load(foreign)
    texts = [
        Text("a cat", "a dog"),
        Text("a cat", "the mat " * 30),
        Text("a " * 9, "a dog"),
        Text("tell me", "the red cat"),
    ]
    table = compute(reader, texts, folder=tmp_path, scorer="other", max_length=40)
    encoded = encode(policy.tokenizer, texts, max_length=64, max_prompt=5)
    assert not same_tokenizer(table, policy.tokenizer)
    first, cut, prompt, last = verify(table, encoded, tokenizer=policy.tokenizer)
    assert (first, last) == (None, None)
    assert cut is not None
    assert cut.startswith("R3: truncation cut the answer")
    assert prompt is not None
    assert prompt.startswith("R3: truncation cut the prompt")
    with pytest.raises(BadReference, match=r"^R3: .* another tokenizer, so its tokens are not the policy's"):
        verify(table, encoded, tokenizer=policy.tokenizer, tokens=True)


def test_text_the_other_tokenizer_does_not_know(policy: Policy, foreign: Path, tmp_path: Path) -> None:
    trainer, texts = Policy.load(foreign), [Text("a cat", "a dog"), Text("a cat", "a zebra")]
    table = compute(policy, texts, folder=tmp_path, scorer="words")
    encoded = encode(trainer.tokenizer, texts)
    assert verify(table, encoded, tokenizer=trainer.tokenizer) == [
        None,
        "R3: the tokenizer of the reference does not know part of the answer",
    ]


def test_answers_without_tokens_are_dropped(policy: Policy, tmp_path: Path) -> None:
    texts = [Text("a cat", "", finished=False), Text("a cat", "a dog")]
    table = compute(policy, texts, folder=tmp_path, scorer="me")
    assert verify(table, said(texts)) == ["R4: the answer has no tokens", None]


def test_sums_only_do_not_serve_a_loss_of_tokens(
    table: ReferenceTable, policy: Policy, texts: list[Text], tmp_path: Path
) -> None:
    sums, encoded = (
        rewritten(table, lambda whole: whole.drop_columns(["token_logp"]), tmp_path / "sums"),
        encode(policy.tokenizer, texts),
    )
    assert verify(sums, encoded) == [None] * len(texts)
    with pytest.raises(BadReference, match=r"^R3: .* holds sums only and the loss reads tokens"):
        verify(sums, encoded, tokens=True)


def test_a_prior_need_not_share_prompts(policy: Policy, texts: list[Text], tmp_path: Path) -> None:
    table = compute(policy, texts, folder=tmp_path, scorer="me", conditioning="prior", max_length=12)
    encoded = encode(policy.tokenizer, texts, max_length=12, max_prompt=9)
    assert table.truncated.any()  # cut answers are the trainer's too, and stay
    assert verify(table, encoded, tokenizer=policy.tokenizer, tokens=True) == [None] * len(texts)
    with pytest.raises(BadReference, match=r"^R2: .*: the answer .* another truncation"):
        verify(table, encode(policy.tokenizer, texts), tokenizer=policy.tokenizer)


def test_random_rows_computed_again(table: ReferenceTable, policy: Policy, texts: list[Text], tmp_path: Path) -> None:
    assert spot_check(table, policy, said(texts)) < 1e-4
    tampered = rewritten(table, lambda whole: with_sum(-1.0, 7)(whole), tmp_path / "tampered")
    with pytest.raises(BadReference, match=r"^R6: .* has -1.0000 nats there and -\d"):
        spot_check(tampered, policy, said(texts), rows=len(texts))
    # a row is missed only where it is not drawn
    missed = 0
    for seed in range(20):
        try:
            spot_check(tampered, policy, said(texts), rows=80, seed=seed)
            missed += 1
        except BadReference:
            pass
    assert 2 <= missed <= 18


def test_one_newline_in_the_template_is_noticed(policy: Policy, texts: list[Text], tmp_path: Path) -> None:
    policy.tokenizer.chat_template = TEMPLATE
    table = compute(policy, texts, folder=tmp_path, scorer="me")
    assert spot_check(table, policy, said(texts)) < 1e-4
    policy.tokenizer.chat_template = TEMPLATE.replace("<assistant>", "<assistant> \n then")
    with pytest.raises(BadReference, match=r"^R6: .* another model, template or precision"):
        spot_check(table, policy, said(texts))


def test_another_model_is_noticed(table: ReferenceTable, policy: Policy, texts: list[Text]) -> None:
    with torch.no_grad():
        policy.model.lm_head.weight[5] += 0.05
    with pytest.raises(BadReference, match=r"^R6"):
        spot_check(table, policy, said(texts))


def test_a_bfloat16_reference_passes_its_own_check(policy: Policy, texts: list[Text], tmp_path: Path) -> None:
    table = compute(policy, texts, folder=tmp_path, scorer="me", precision="bfloat16")
    assert spot_check(table, policy, said(texts), rows=len(texts)) < 0.5
