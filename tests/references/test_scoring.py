"""Scores against one-by-one computation; interrupted, resumed and full disks; what is stored about each row."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from reading import each

from pyrite.core import runs
from pyrite.models import references
from pyrite.models.policy import Policy
from pyrite.models.references import BadReference, load

from .conftest import TEMPLATE, Forwards, Text, by_hand, compute, encode, id_of


@pytest.mark.parametrize("conditioning", ["prompt", "prior"])
def test_the_numbers_are_the_models_own(policy: Policy, texts: list[Text], tmp_path: Path, conditioning: str) -> None:
    table = compute(policy, texts, folder=tmp_path / "t", scorer="me", conditioning=conditioning)  # type: ignore[arg-type]
    for text, one in zip(texts, each(encode(policy.tokenizer, texts)), strict=True):
        row = table.places[id_of(text)]
        prompt = one.prompt if conditioning == "prompt" else [policy.tokenizer.bos_token_id]
        want = by_hand(policy, prompt, one.response)
        np.testing.assert_allclose(table.tokens(row), want, atol=2e-5)
        assert table.sum_logp[row] == pytest.approx(want.double().sum().item(), abs=1e-4)
        assert table.sum_logp[row] == table.tokens(row).sum(dtype=np.float64)
        assert table.n_resp_tokens[row] == len(one.response)
        assert table.n_prompt_tokens[row] == len(prompt)
    assert not table.truncated.any()
    assert not any((tmp_path / "t").glob(".*"))


def test_own_template_and_prior_header(policy: Policy, texts: list[Text], tmp_path: Path) -> None:
    policy.tokenizer.chat_template = TEMPLATE
    table = compute(policy, texts[:4], folder=tmp_path, scorer="me", conditioning="prior")
    assert table.recipe["conditioning"]["header"] == "<bos> <assistant>"
    assert table.n_prompt_tokens.tolist() == [2] * 4


def test_what_is_said_of_a_row(policy: Policy, tmp_path: Path) -> None:
    texts = [
        Text("a cat", "a dog"),
        Text("a cat", "zebra " * 9),
        Text("a " * 7, "b"),
    ]
    table = compute(policy, texts, folder=tmp_path, scorer="me", max_length=8, max_prompt=4)
    assert table.truncated.tolist() == [False, True, False]
    assert table.prompt_truncated.tolist() == [False, False, True]
    assert table.n_unknown.tolist() == [0, 5, 1]
    assert table.recipe["truncation"]["max_length"] == 8
    assert table.manifest["scorer"] == {"name": "me", "revision": None, "files": None}


def test_equal_texts_are_scored_once_and_mode_is_kept(policy: Policy, texts: list[Text], tmp_path: Path) -> None:
    policy.train()
    table = compute(policy, [*texts, *texts], folder=tmp_path, scorer="me")
    assert len(table) == len(texts)
    assert policy.training


def test_a_finished_reference_is_returned_and_another_refused(
    policy: Policy, texts: list[Text], tmp_path: Path, forwards: Forwards
) -> None:
    compute(policy, texts, folder=tmp_path, scorer="me")
    before = forwards.passes
    again = compute(policy, texts[::-1], folder=tmp_path, scorer="me")
    assert forwards.passes == before
    assert len(again) == len(texts)
    with pytest.raises(BadReference, match=r"^R7: .* holds another reference already"):
        compute(policy, texts, folder=tmp_path, scorer="me", max_length=32)


def parts_of(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("part-*"))]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "PART", 30)


@pytest.mark.usefixtures("small_parts")
def test_an_interrupted_computation_goes_on(
    policy: Policy, texts: list[Text], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forwards: Forwards
) -> None:
    full = compute(policy, texts, folder=tmp_path / "full", scorer="me", budget=128)
    whole, write, done = forwards.passes, references.write_part, []

    def stopped(path: Path, *part: object) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(path)
        write(path, *part)  # type: ignore[arg-type]

    monkeypatch.setattr(references, "write_part", stopped)
    with pytest.raises(KeyboardInterrupt):
        compute(policy, texts, folder=tmp_path / "cut", scorer="me", budget=128)
    with pytest.raises(BadReference, match=r"^R7: .* is not finished"):
        load(tmp_path / "cut")
    monkeypatch.setattr(references, "write_part", write)
    with pytest.raises(BadReference, match=r"^R7: .* unfinished reference of something else"):
        compute(policy, texts, folder=tmp_path / "cut", scorer="me", max_length=50)
    done[1].write_bytes(done[1].read_bytes()[:-10])  # a part that the crash left damaged is made again
    before = forwards.passes
    resumed = compute(policy, texts, folder=tmp_path / "cut", scorer="me", budget=128)
    assert forwards.passes - before < whole * 0.8
    assert parts_of(tmp_path / "cut") == parts_of(tmp_path / "full")
    assert resumed.manifest["fingerprint"] == full.manifest["fingerprint"]
    assert (resumed.sum_logp == full.sum_logp).all()


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("fails", [1, 3, 7])
def test_a_full_disk_leaves_nothing_accepted(
    policy: Policy, texts: list[Text], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    """Parts and manifest each meet a full disk in turn."""
    fsync, count = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadReference, match=r"^R7: cannot write .*No space left on device; make room"):
        compute(policy, texts, folder=tmp_path, scorer="me")
    assert count == fails
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(BadReference, match=r"^R7"):
        load(tmp_path)
    assert not [path for path in tmp_path.glob(".part*")]
    assert len(compute(policy, texts, folder=tmp_path, scorer="me")) == len(texts)


def test_a_real_limit_on_file_size(policy: Policy, texts: list[Text], tmp_path: Path) -> None:
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(BadReference, match=r"^R7: cannot write .*File too large"):
            compute(policy, texts, folder=tmp_path, scorer="me")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not any(tmp_path.iterdir())


def test_a_model_that_gives_no_number_is_refused(policy: Policy, texts: list[Text], tmp_path: Path) -> None:
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(BadReference, match=rf"^R1: the answer '{texts[0].answer}' to .*: the model gives nan"):
        compute(policy, texts, folder=tmp_path, scorer="me")
    assert not list(tmp_path.glob("part-*"))


def test_bfloat16_is_said_and_close(policy: Policy, texts: list[Text], tmp_path: Path) -> None:
    exact = compute(policy, texts, folder=tmp_path / "a", scorer="me")
    rough = compute(policy, texts, folder=tmp_path / "b", scorer="me", precision="bfloat16")
    assert rough.recipe["numerics"]["compute"] == "bfloat16"
    gap = np.abs(exact.sum_logp - rough.sum_logp) / exact.n_resp_tokens
    assert 0 < gap.max() < 0.02


def test_a_reference_is_its_parts_and_a_manifest(policy: Policy, texts: list[Text], tmp_path: Path) -> None:
    compute(policy, texts, folder=tmp_path, scorer="me")
    assert sorted(path.name for path in tmp_path.iterdir()) == [references.MANIFEST, "part-00000.parquet"]
    assert runs.read_json(tmp_path / references.MANIFEST)["parts"][0]["rows"] == len(texts)
