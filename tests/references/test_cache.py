"""A model's reference is computed once: found again by files or by weights, by any order and subset of the data."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pyrite.models.policy import Policy
from pyrite.models.references import BadReference, Source, Text, compute, load, tables
from pyrite.models.references.scoring import Trainer, model_table

from .conftest import TEMPLATE, Forwards


@pytest.fixture
def trainer(policy: Policy, tmp_path: Path) -> Trainer:
    return Trainer(
        policy, "the policy", (64, 48), tokens=False, precision="float32", cache=tmp_path / "cache", budget=512
    )


def test_the_second_time_nothing_is_computed(
    trainer: Trainer, texts: list[Text], stronger: Path, forwards: Forwards, capsys: pytest.CaptureFixture[str]
) -> None:
    made, own = model_table(Source("model", str(stronger)), texts, trainer)
    assert not own
    assert made.folder.name == made.manifest["fingerprint"][:16]
    assert f"reference: computed 160 rows of {stronger} in " in capsys.readouterr().err
    passes, loads = forwards.passes, forwards.loads
    assert passes > 0
    for asked in (texts, texts[::-1], texts[20:60]):
        again, _ = model_table(Source("model", str(stronger)), asked, trainer)
        assert again.folder == made.folder
        assert f"reference: reused {made.folder}, no forward pass" in capsys.readouterr().err
    assert (forwards.passes, forwards.loads) == (passes, loads)  # the model is not even loaded
    more, _ = model_table(Source("model", str(stronger)), [*texts, Text("a cat", "a dog")], trainer)
    assert more.folder != made.folder


def test_the_policy_is_known_by_its_weights(
    trainer: Trainer, texts: list[Text], tiny: Path, tmp_path: Path, forwards: Forwards
) -> None:
    """Self, the folder it came from and a copy elsewhere are one reference."""
    mine, _ = model_table(Source("self"), texts, trainer)
    shutil.copytree(tiny, tmp_path / "copy")
    passes = forwards.passes
    for path in (tiny, tmp_path / "copy"):
        assert model_table(Source("model", str(path)), texts, trainer)[0].folder == mine.folder
    assert forwards.passes == passes
    with torch.no_grad():
        trainer.policy.model.lm_head.weight[5] += 0.1
    assert model_table(Source("self"), texts, trainer)[0].folder != mine.folder


def test_a_file_made_on_another_machine_is_found(trainer: Trainer, texts: list[Text], forwards: Forwards) -> None:
    compute(trainer.policy, texts, folder=trainer.cache / "by hand", scorer="elsewhere")
    passes = forwards.passes
    found, _ = model_table(Source("self"), texts, trainer)
    assert found.folder == trainer.cache / "by hand"
    assert forwards.passes == passes


def test_what_must_differ_is_not_mixed_up(trainer: Trainer, texts: list[Text], tiny: Path) -> None:
    folders = [
        model_table(source, texts, asked)[0].folder
        for source, asked in (
            (Source("self"), trainer),
            (Source("prior"), trainer),
            (Source("self"), replace(trainer, limits=(63, 48))),
            (Source("self"), replace(trainer, precision="bfloat16")),
            (Source("model", str(tiny), options={"dtype": "bfloat16"}), trainer),
        )
    ]
    assert len(set(folders)) == 5


def test_sums_do_not_serve_where_tokens_are_needed(trainer: Trainer, texts: list[Text], forwards: Forwards) -> None:
    compute(trainer.policy, texts, folder=trainer.cache / "sums", scorer="me", tokens=False)
    passes = forwards.passes
    assert model_table(Source("self"), texts, trainer)[0].folder.name == "sums"
    assert forwards.passes == passes
    table, _ = model_table(Source("self"), texts, replace(trainer, tokens=True))
    assert table.token_logp is not None
    assert table.folder.name != "sums"


def test_a_damaged_file_is_refused_not_replaced(trainer: Trainer, texts: list[Text]) -> None:
    table, _ = model_table(Source("self"), texts, trainer)
    part = table.folder / tables.FIRST_PART
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(BadReference, match=r"^R7: .* was changed"):
        model_table(Source("self"), texts, trainer)


def test_strangers_in_the_cache_are_left_alone(trainer: Trainer, texts: list[Text]) -> None:
    for name, content in (("broken", "{"), ("other", "{}")):
        (trainer.cache / name).mkdir(parents=True)
        (trainer.cache / name / tables.MANIFEST).write_text(content)
    assert len(model_table(Source("self"), texts, trainer)[0]) == 160
    assert len(model_table(Source("self"), texts, trainer)[0]) == 160


def test_another_tokenizer_reads_with_all_its_room(trainer: Trainer, texts: list[Text], foreign: Path) -> None:
    table, own = model_table(Source("model", str(foreign)), texts, replace(trainer, limits=(20, 15)))
    assert not own
    assert table.recipe["truncation"]["max_length"] == 200
    assert not table.truncated.any()
    assert table.token_logp is None


def test_another_template_is_the_models_own_way(
    trainer: Trainer, texts: list[Text], stronger: Path, tmp_path: Path
) -> None:
    scorer = Policy.load(stronger)
    scorer.tokenizer.chat_template = TEMPLATE
    scorer.save(tmp_path / "chat")
    table, own = model_table(Source("model", str(tmp_path / "chat")), texts, trainer)
    assert own
    assert table.recipe["template"]["sha256"]
    loaded = load(table.folder)
    assert loaded.token_logp is not None
