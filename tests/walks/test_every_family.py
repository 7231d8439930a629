"""Every causal family of transformers, at its default config with small sizes: right, or refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import Row, by_loop, random_rows
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pyrite.data.responses import Responses
from pyrite.models import forward
from pyrite.models.policy import Policy

SHAPES = [(3, [7, 3]), (1, [5]), (8, [2, 4])]


@pytest.fixture
def tokenizer(tiny: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny)


def tokens_of(model: torch.nn.Module, shapes: list) -> list[Row]:
    """Random rows of what this model reads."""
    size = model.config.get_text_config().vocab_size  # type: ignore[union-attr]
    rows = random_rows(shapes)
    return [Row([t % size for t in row.prompt], [[t % size for t in r] for r in row.responses]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("sizeable", [True, False], ids=["sizeable", "fresh"])
@pytest.mark.parametrize("name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_family_of_transformers_is_right_or_refused(name: str, sizeable: bool, monkeypatch, tokenizer) -> None:
    """Of its default config with small sizes; what needs more than a text, or cannot be made small, is skipped."""
    try:
        config = AutoConfig.for_model(name)
        forward._shrink(config.get_text_config())
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        kind = kind[0] if isinstance(kind, tuple) else kind
        with torch.device("meta"):
            shape = kind(copy.deepcopy(config))  # type: ignore[misc]
        if not sizeable:
            monkeypatch.setattr(forward, "_enlarge", lambda model: None)
        model = forward._built(shape, config)
        monkeypatch.undo()
        assert model is not None
        rows = tokens_of(model, SHAPES)
        with torch.no_grad():
            want = torch.cat(by_loop(model, rows))
        assert want.isfinite().all()
    except Exception as error:
        pytest.skip(f"{type(error).__name__}: {str(error)[:100]}")
    try:
        policy = Policy(model, tokenizer)
    except ValueError as error:
        assert "a policy needs a" in str(error)
        return
    with torch.no_grad():
        got = policy(policy.pack(Responses.of(rows)))
    for weight in model.parameters():
        weight.data *= 1 + 1e-7 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # some deep models make much of the last bit of a weight
        rounding = (torch.cat(by_loop(model, rows)) - want).abs().max().item()
    torch.testing.assert_close(got, want, atol=5e-5 + 2 * rounding, rtol=1e-4)
