"""Exact KL and entropy by position: by hand, in the right direction, with adapters off, unbiased and less noisy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import Row, build, random_rows, read_rows
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pyrite.data.responses import Responses
from pyrite.math.logps import Logps
from pyrite.models.loading import Lora
from pyrite.models.policy import Policy
from pyrite.training.evaluation import Divergences, divergences

ROWS = random_rows([(4, [3]), (1, [2]), (7, [6])])


@pytest.fixture
def tokenizer(tiny: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny)


def by_hand(policy: Policy, ref: Policy, row: Row) -> tuple[list[float], list[float]]:
    """Sums over the vocabulary in float64, of the model's own forward: KL(policy || ref), entropy."""
    ids = torch.tensor([[*row.prompt, *row.responses[0]]])
    with torch.no_grad():
        p, q = (m.model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].double().softmax(-1) for m in (policy, ref))
    kl = [sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(*both, strict=True)) for both in zip(p, q, strict=True)]
    return [float(value) for value in kl], [float(-(a * a.log()).sum()) for a in p]


@pytest.mark.parametrize(("ours", "theirs"), [("llama", "llama"), ("llama", "gemma2"), ("phi", "llama")])
@pytest.mark.parametrize("budget", [1, 16384])
def test_by_hand(ours: str, theirs: str, budget: int, tokenizer: PreTrainedTokenizerFast) -> None:
    """Packed and padded models alike; the other way around is another number."""
    policy, ref = (Policy(build(family, seed=seed), tokenizer) for family, seed in ((ours, 0), (theirs, 1)))
    found, reverse = (divergences(*both, Responses.of(ROWS), budget=budget) for both in ((policy, ref), (ref, policy)))
    for i, row in enumerate(ROWS):
        kl, entropy = by_hand(policy, ref, row)
        assert found.kl[i].tolist() == pytest.approx(kl, abs=1e-5)
        assert found.entropy[i].tolist() == pytest.approx(entropy, abs=1e-5)
        assert sum(kl) > 0 and reverse.kl[i].sum().item() != pytest.approx(sum(kl), rel=1e-3)
    assert found.ref.tokens is not None
    torch.testing.assert_close(found.ref.sum, read_rows(ref, ROWS).sum, atol=1e-5, rtol=1e-5)


def test_of_itself_it_is_zero(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = Policy(build("llama"), tokenizer)
    found = divergences(policy, Policy(build("llama"), tokenizer), Responses.of(ROWS))
    assert all(row.abs().max() < 1e-6 for row in found.kl)


def test_its_own_reference_is_the_policy_without_adapters(tiny: Path) -> None:
    policy = Policy.load(tiny, lora=Lora(r=2))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    rows = Responses.of([([1, 5, 6], [[7, 8, 2]]), ([1, 9], [[10, 11, 12, 13]])])
    own, other = divergences(policy, policy, rows), divergences(policy, Policy.load(tiny), rows)
    assert own.summary()["kl_exact"].min() > 1e-3
    for name, values in other.summary().items():
        torch.testing.assert_close(own.summary()[name], values, atol=1e-4, rtol=1e-4)


def test_summary_worked() -> None:
    ref = Logps.from_tokens([torch.tensor([-1.0, -1.0]), torch.tensor([-2.0])])
    kl, entropy = [torch.tensor([0.5, 1.0]), torch.tensor([0.25])], [torch.tensor([2.0, 1.0]), torch.tensor([3.0])]
    found = Divergences(ref, kl, entropy).summary()
    assert {name: values.tolist() for name, values in found.items()} == {
        "kl_exact": [1.5, 0.25],
        "entropy_exact": [1.5, 3.0],
    }
