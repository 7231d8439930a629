"""A model's reference is computed once: found again by files or by weights, by any order and subset of the data."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyrite.models.policy import Policy
from pyrite.models.references import BadReference, load, obtain, parse

from .conftest import TEMPLATE, Forwards, Text, compute, encode

Ask = Callable[..., Path]


@pytest.fixture
def ask(policy: Policy, texts: list[Text], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """The folder of the file that serves a spec."""

    def ask(spec: Any = "self", *, asked: list[Text] = texts, limits: tuple[int, int] = (64, 48), **options) -> Path:
        lengths = dict(zip(("max_length", "max_prompt"), limits, strict=True))
        encoded = encode(policy.tokenizer, asked, **lengths)
        where = {"policy": policy, "policy_path": "the policy", "cache": tmp_path / "cache"}
        capsys.readouterr()
        obtain(parse(str(spec)), encoded, **where, **lengths, **options)
        said = capsys.readouterr().err
        found = re.search(
            r"reference: computed \d+ rows of .* in .* s, kept in (.*)|reused (.*), no forward pass", said
        )
        assert found, said
        return Path(found[1] or found[2])

    return ask


def test_the_second_time_nothing_is_computed(ask: Ask, texts: list[Text], stronger: Path, forwards: Forwards) -> None:
    made = ask(stronger)
    assert made.name == load(made).manifest["fingerprint"][:16]
    assert load(made).manifest["scorer"]["name"] == str(stronger)
    passes, loads = forwards.passes, forwards.loads
    assert passes > 0
    for asked in (texts, texts[::-1], texts[20:60]):
        assert ask(stronger, asked=asked) == made
    assert (forwards.passes, forwards.loads) == (passes, loads)  # the model is not even loaded
    assert ask(stronger, asked=[*texts, Text("a cat", "a dog"), Text("a cat", "red")]) != made


def test_the_policy_is_known_by_its_weights(
    ask: Ask, policy: Policy, tiny: Path, tmp_path: Path, forwards: Forwards
) -> None:
    """Self, the folder it came from and a copy elsewhere are one reference."""
    mine = ask()
    shutil.copytree(tiny, tmp_path / "copy")
    passes = forwards.passes
    for path in (tiny, tmp_path / "copy"):
        assert ask(path) == mine
    assert forwards.passes == passes
    with torch.no_grad():
        policy.model.lm_head.weight[5] += 0.1
    assert ask() != mine


def test_a_file_made_on_another_machine_is_found(
    ask: Ask, policy: Policy, texts: list[Text], tmp_path: Path, forwards: Forwards
) -> None:
    compute(policy, texts, folder=tmp_path / "cache" / "by hand", scorer="elsewhere")
    passes = forwards.passes
    assert ask() == tmp_path / "cache" / "by hand"
    assert forwards.passes == passes


def test_what_must_differ_is_not_mixed_up(ask: Ask, tiny: Path) -> None:
    folders = [ask(), ask("prior"), ask(limits=(63, 48)), ask(precision="bfloat16"), ask(f"{tiny}(dtype=bfloat16)")]
    assert len(set(folders)) == 5


def test_a_damaged_file_is_refused_not_replaced(ask: Ask) -> None:
    part = ask() / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(BadReference, match=r"^R7: .* was changed"):
        ask()


def test_strangers_in_the_cache_are_left_alone(ask: Ask, tmp_path: Path) -> None:
    for name, content in (("broken", "{"), ("other", "{}")):
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / "manifest.json").write_text(content)
    assert ask() == ask()


def test_another_tokenizer_reads_with_all_its_room(ask: Ask, foreign: Path) -> None:
    table = load(ask(foreign, limits=(20, 15)))
    assert table.recipe["truncation"]["max_length"] == 200
    assert not table.truncated.any()


def test_another_template_is_the_models_own_way(ask: Ask, stronger: Path, tmp_path: Path) -> None:
    scorer = Policy.load(stronger)
    scorer.tokenizer.chat_template = TEMPLATE
    scorer.save(tmp_path / "chat")
    table = load(ask(tmp_path / "chat", tokens=True))
    assert table.recipe["template"]["sha256"]
    assert table.token_logp is not None
