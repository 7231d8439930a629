"""Specs of references: what each form means, and errors that name the piece."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyrite.models.references import MANIFEST, RefSource, parse

PART = "part-00000.parquet"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("self", RefSource("self")),
        (" none ", RefSource("none")),
        ("prior", RefSource("prior")),
        ("column", RefSource("column")),
        ("column(chosen=a, rejected=b)", RefSource("column", options={"chosen": "a", "rejected": "b"})),
        ("ema", RefSource("ema", options={"rate": 0.01, "every": 1})),
        ("ema(rate=0.5,every=4)", RefSource("ema", options={"rate": 0.5, "every": 4})),
        ("org/name", RefSource("model", "org/name")),
        ("gpt2", RefSource("model", "gpt2")),
        ("org/name(dtype=bfloat16)", RefSource("model", "org/name", options={"dtype": "bfloat16"})),
        ("prior(org/name, dtype=float32)", RefSource("prior", "org/name", options={"dtype": "float32"})),
        ("1e-1*self", RefSource("self", weight=0.1)),
    ],
)
def test_one_source(spec: str, expected: RefSource) -> None:
    assert parse(spec) == [expected]


@pytest.mark.parametrize("spec", ["0.5*self + 0.25*org/name+0.25*prior", "0.5 * self  +  .25*org/name + 0.25 *prior"])
def test_a_sum(spec: str) -> None:
    assert parse(spec) == [
        RefSource("self", weight=0.5),
        RefSource("model", "org/name", 0.25),
        RefSource("prior", weight=0.25),
    ]


def test_paths(tmp_path: Path) -> None:
    model, table, run, odd = (tmp_path / name for name in ("model", "table", "run", "c++ (2) + x"))
    for folder in (model, table, run / "table", odd):
        folder.mkdir(parents=True)
    for folder in (model, odd):
        (folder / "config.json").write_text("{}")
    for folder in (table, run / "table"):
        (folder / MANIFEST).write_text("{}")
        (folder / PART).write_text("")
    assert parse(str(model)) == [RefSource("model", str(model))]
    assert parse(str(odd)) == [RefSource("model", str(odd))]
    assert parse(f"0.5*self + 0.5*{table}")[1] == RefSource("table", str(table), 0.5)
    assert parse(str(table / PART)) == parse(str(table / MANIFEST)) == [RefSource("table", str(table))]
    assert parse(str(run)) == [RefSource("table", str(run / "table"))]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("slef", r"'slef' is neither .* did you mean 'self'"),
        ("0.5*slef + 0.5*prior", r"'0.5\*slef' .* did you mean 'self'"),
        ("self + none", "'none' cannot be part of a sum"),
        ("0.5*ema", "'ema' cannot be part of a sum"),
        ("0*self", r"the weight in '0\*self' must be a positive number"),
        ("-1*self", "must be a positive number"),
        ("1.2.3*self", "must be a positive number"),
        ("ema(rate=2)", "'rate=2' in .* at most 1"),
        ("ema(every=0)", "'every=0' in .* at least 1"),
        ("ema(speed=1)", "'speed=1' is no option .* it takes rate, every"),
        ("self(x=1)", "'x=1' is no option .* none at all"),
        ("prior(a, b)", "'b' is no option"),
        ("org/name(dtype=int8)", "give 'float32' or 'bfloat16'"),
        ("org/name(own_template=True)", "'own_template=True' is no option .* it takes dtype"),
        ("no where/at all", "neither a model nor a finished reference"),
        ("", "names nothing"),
        ("0.5*", "names nothing"),
    ],
)
def test_errors_name_the_piece(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        parse(spec)
    assert "\n" not in str(error.value)


def test_errors_about_folders(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=rf"did you mean {tmp_path}/model\?"):
        parse(str(tmp_path))
    (tmp_path / PART).write_text("{}")
    with pytest.raises(ValueError, match="is not finished; run the command"):
        parse(str(tmp_path))
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match="knows its conditioning; name it alone"):
        parse(f"prior({tmp_path})")
