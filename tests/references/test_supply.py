"""What a trainer gets: values, alignment, dropped pairs and notes, for every source and for sums of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reading import each

from pyrite.math.logps import Logps
from pyrite.models import references
from pyrite.models.forward import by_response
from pyrite.models.loading import Lora
from pyrite.models.policy import Policy
from pyrite.models.references import BadReference, obtain, parse

from .conftest import TEMPLATE, Forwards, Text, by_hand, compute, encode, id_of

Supply = tuple[Logps, list[str | None], list[str]]


@pytest.fixture
def supply(policy: Policy, texts: list[Text], rows: list[dict], tmp_path: Path):
    """obtain(spec) for the pairs of the data."""

    def ask(spec: str, *, asked: list[Text] = texts, by: Policy = policy, **options) -> Supply:
        limits = {name: options[name] for name in ("max_length", "max_prompt") if name in options}
        encoded = encode(by.tokenizer, asked, **limits)
        if "columns" in options:
            encoded = replace(encoded, rows=[row for row in options.pop("columns") for _ in ("chosen", "rejected")])
        logps, reasons, notes = obtain(
            parse(spec),
            encoded,
            policy=by,
            policy_path="mine",
            cache=tmp_path / "cache",
            **options,
        )
        return logps, reasons, notes  # type: ignore[return-value]

    return ask


def hand_sums(policy: Policy, texts: list[Text]) -> list[float]:
    encoded = encode(policy.tokenizer, texts)
    return [by_hand(policy, one.prompt, one.response).double().sum().item() for one in each(encoded)]


def test_self_is_the_policy_at_step_0(supply, policy: Policy, texts: list[Text]) -> None:
    logps, reasons, notes = supply("self", tokens=True)
    encoded = encode(policy.tokenizer, texts)
    pairs = torch.arange(len(encoded)).view(-1, 2).tolist()
    with torch.no_grad():
        batch = policy.pack(encoded, pairs)
        live = by_response(policy(batch), batch, tokens=True)
    assert reasons == [None] * 80
    assert logps.aligned
    torch.testing.assert_close(logps.sum, live.sum, atol=1e-4, rtol=0)
    torch.testing.assert_close(logps.tokens, live.tokens, atol=1e-5, rtol=0)
    assert (logps.mask == live.mask).all()
    assert (logps.length == live.length).all()
    margins = references.margins(live.sum.double().numpy())
    assert any(f"ranks chosen first in {margins['accuracy']:.1%}" in note for note in notes)
    sums, *_ = supply("self")
    assert sums.tokens is None
    torch.testing.assert_close(sums.sum, logps.sum)


def test_self_with_fresh_adapters_is_the_base_model(supply, tiny: Path, forwards: Forwards) -> None:
    plain, *_ = supply("self")
    passes = forwards.passes
    adapted, *_ = supply("self", by=Policy.load(tiny, lora=Lora(r=2, dropout=0.5)))
    assert forwards.passes == passes
    assert (plain.sum == adapted.sum).all()


def test_none_and_ema(supply, forwards: Forwards) -> None:
    assert supply("none") == (None, [None] * 80, [])
    with pytest.raises(BadReference, match=r"^R8: a reference that moves"):
        supply("ema(rate=0.1)")
    assert forwards.passes == 0


def test_models_priors_and_their_sum(supply, policy: Policy, stronger: Path, texts: list[Text]) -> None:
    logps, *_ = supply(str(stronger))
    np.testing.assert_allclose(logps.sum, hand_sums(Policy.load(stronger), texts), atol=1e-3)
    prior, _, notes = supply("prior")
    start = policy.tokenizer.bos_token_id
    want = [by_hand(policy, [start], one.response).sum().item() for one in each(encode(policy.tokenizer, texts))]
    np.testing.assert_allclose(prior.sum, want, atol=1e-3)
    assert any("scores answers without their prompts, after '<bos>'" in note for note in notes)
    by_token, *_ = supply(str(stronger), tokens=True)
    assert by_token.aligned
    torch.testing.assert_close(by_token.tokens.sum(1), logps.sum, atol=1e-4, rtol=0)
    mixed, reasons, _ = supply(f"0.25*self + 0.5*{stronger} + 0.25*prior", tokens=True)
    mine, *_ = supply("self")
    torch.testing.assert_close(mixed.sum, 0.25 * mine.sum + 0.5 * logps.sum + 0.25 * prior.sum, atol=1e-4, rtol=0)
    assert mixed.aligned
    torch.testing.assert_close(mixed.tokens.sum(1), mixed.sum, atol=1e-4, rtol=0)
    assert reasons == [None] * 80
    part, _, notes = supply("0.5*self")
    torch.testing.assert_close(part.sum, 0.5 * mine.sum)
    assert "the weights of the reference add up to 0.5, not 1: it is no distribution" in notes


def test_another_tokenizer(supply, policy: Policy, foreign: Path, texts: list[Text]) -> None:
    logps, reasons, notes = supply(str(foreign))
    np.testing.assert_allclose(logps.sum, hand_sums_of(Policy.load(foreign), texts), atol=1e-3)
    assert not logps.aligned
    assert reasons == [None] * 80
    assert (logps.length == torch.tensor([len(one.response) for one in each(encode(policy.tokenizer, texts))])).all()
    assert any("has another tokenizer: sums are compared" in note for note in notes)
    mixed, *_ = supply(f"0.5*self + 0.5*{foreign}")
    assert not mixed.aligned
    with pytest.raises(BadReference, match=r"^R3: .* another tokenizer"):
        supply(str(foreign), tokens=True)


def hand_sums_of(policy: Policy, texts: list[Text]) -> list[float]:
    encoded = encode(policy.tokenizer, texts, max_length=200, max_prompt=150)
    return [by_hand(policy, one.prompt, one.response).double().sum().item() for one in each(encoded)]


def test_pairs_that_cannot_be_compared_are_dropped_with_the_reason(supply, foreign: Path) -> None:
    texts = [Text("a cat", "a dog"), Text("a cat", "a " * 70), Text("a cat", "red"), Text("a cat", "a zebra")]
    _, reasons, notes = supply(str(foreign), asked=texts)
    assert reasons == ["R3: truncation cut the answer for the policy or the reference", None]
    _, reasons, _ = supply("self", asked=texts)
    assert reasons == [None, None]
    _, reasons, notes = supply(f"0.5*self + 0.5*{foreign}", asked=texts[:2])
    assert reasons[0] is not None
    assert notes[-1] == "reference margins: no pair is left"


def test_a_model_with_its_own_template_stays_aligned(supply, stronger: Path, tmp_path: Path) -> None:
    scorer = Policy.load(stronger)
    scorer.tokenizer.chat_template = TEMPLATE
    scorer.save(tmp_path / "chat")
    logps, reasons, notes = supply(str(tmp_path / "chat"), tokens=True)
    assert logps.aligned
    assert reasons == [None] * 80
    assert any("in its own chat template, which is not the policy's" in note for note in notes)
    table = next(path for path in (tmp_path / "cache").iterdir())
    with pytest.raises(BadReference, match=r"^R2: .*the prompt of the answer '"):
        supply(str(table))
    again, *_ = supply(str(tmp_path / "chat"))
    torch.testing.assert_close(again.sum, logps.sum)


def test_a_finished_reference(
    supply, policy: Policy, stronger: Path, texts: list[Text], tmp_path: Path, forwards: Forwards, capsys
) -> None:
    other = compute(Policy.load(stronger), texts[::-1], folder=tmp_path / "other", scorer="strong")
    want = {id_of(one): other.sum_logp[other.places[id_of(one)]] for one in texts}
    passes = forwards.passes
    logps, *_ = supply(str(tmp_path / "other"))
    assert forwards.passes == passes
    assert logps.sum.tolist() == [np.float32(want[id_of(one)]).item() for one in texts]
    mine = compute(policy, texts, folder=tmp_path / "mine", scorer="me")
    capsys.readouterr()
    supply(str(mine.folder))
    assert "32 rows computed again, they differ by" in capsys.readouterr().err
    with pytest.raises(BadReference, match=r"^R2: .* the answer '.*' to '.*' was read as other tokens"):
        supply(str(mine.folder), max_length=12, max_prompt=9)
    with pytest.raises(BadReference, match=r"^R1: .*: the answer 'a dog' to 'a cat' is not there"):
        supply(str(mine.folder), asked=[Text("a cat", "a dog"), Text("a cat", "a bird")])


def test_columns(supply, rows: list[dict]) -> None:
    given = [{**row, "chosen_logprob": -1.0 - i, "rejected_logprob": -2} for i, row in enumerate(rows)]
    logps, reasons, _ = supply("column", columns=given)
    assert logps.sum[:4].tolist() == [-1.0, -2.0, -2.0, -2.0]
    assert not logps.aligned
    assert reasons == [None] * 80
    named = [{**row, "a": -5.0, "b": -6.0} for row in rows]
    assert supply("column(chosen=a, rejected=b)", columns=named)[0].sum[:2].tolist() == [-5.0, -6.0]
    trl = [{**row, "ref_chosen_logps": -5.0, "ref_rejected_logps": -6.0} for row in rows]
    assert supply("column", columns=trl)[0].sum[:2].tolist() == [-5.0, -6.0]
    mixed, *_ = supply("0.5*self + 0.5*column", columns=given)
    torch.testing.assert_close(mixed.sum, 0.5 * supply("self")[0].sum + 0.5 * logps.sum, atol=1e-4, rtol=0)
    assert not mixed.aligned


@pytest.mark.parametrize("value", [None, "x", math.nan, math.inf, 1.0, True])
def test_bad_columns_are_refused(supply, rows: list[dict], value: object) -> None:
    given = [
        {**row, "chosen_logprob": -1.0, "rejected_logprob": value if i == 2 else -2.0} for i, row in enumerate(rows)
    ]
    with pytest.raises(
        BadReference, match=rf"^R1: column 'rejected_logprob' of the answer '{rows[2]['rejected']}' to .* holds"
    ):
        supply("column", columns=given)


def test_columns_hold_sums_only_and_must_be_given(supply, rows: list[dict]) -> None:
    with pytest.raises(BadReference, match=r"^R3: a column holds sums only"):
        supply("column", columns=rows, tokens=True)
    with pytest.raises(BadReference, match=r"^R1: column 'chosen_logprob' of the answer .* None"):
        supply("column", columns=rows)
