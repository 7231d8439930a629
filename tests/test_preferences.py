"""Pairs as a policy learns from them: what is dropped, the loss of a batch against stock models, metrics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pyrite.math import losses
from pyrite.math.logps import Logps, Running
from pyrite.models.packing import Row
from pyrite.models.policy import Policy
from pyrite.training.pairs import Preferences, batch_loss, encode_pairs, measure, metrics, paired, value_at_ref

PAIRS = [
    {"prompt_id": "a", "prompt": "tell me", "chosen": "the cat sat", "rejected": "a dog"},
    {"prompt_id": "b", "prompt": "tell me about", "chosen": "a bird sang on a tree", "rejected": "the mat"},
    {"prompt_id": "c", "prompt": "please", "chosen": "red", "rejected": "blue and big"},
]


@pytest.fixture(scope="module")
def policy(tiny: Path) -> Policy:
    return Policy.load(tiny)


def direct(policy: Policy, row: Row) -> list[torch.Tensor]:
    """Token log-probabilities of a row's responses by the stock model."""
    found = []
    for response in row.responses:
        logp = policy.model(input_ids=torch.tensor([[*row.prompt, *response]])).logits[0].log_softmax(-1)
        found.append(logp[len(row.prompt) - 1 : -1].gather(1, torch.tensor(list(response))[:, None]).squeeze(1))
    return found


def references(n: int) -> Logps:
    drawn = -torch.rand(2 * n, generator=torch.Generator().manual_seed(0)) * 20
    return Logps.from_sums(drawn, torch.ones(2 * n))


def test_rows_hold_prompt_chosen_rejected(policy: Policy) -> None:
    made = encode_pairs(policy.tokenizer, PAIRS, max_length=32)
    prefs = made.preferences()
    assert made.dropped == []
    assert policy.tokenizer.decode(prefs.rows[0].prompt) == "<bos> tell me"
    said = [policy.tokenizer.decode(response) for response in prefs.rows[0].responses]
    assert said == ["the cat sat <eos>", "a dog <eos>"]
    assert prefs.strength is None


@pytest.mark.parametrize(
    ("pair", "limit", "on_cut", "reason"),
    [
        ({"chosen": "cat " * 30, "rejected": "dog"}, 12, "drop", "truncation cut one answer only"),
        ({"chosen": "cat " * 30, "rejected": "dog"}, 12, "keep", None),
        ({"chosen": "cat " * 30, "rejected": "dog " * 30}, 12, "drop", None),
        ({"chosen": "cat " * 30, "rejected": "cat " * 31}, 12, "drop", "both answers are the same tokens"),
    ],
)
def test_pairs_that_cannot_teach_are_dropped(policy: Policy, pair, limit, on_cut, reason) -> None:
    rows = [PAIRS[0], {"prompt_id": "x", "prompt": "tell me", **pair}]
    made = encode_pairs(policy.tokenizer, rows, max_length=limit, on_cut=on_cut)
    assert made.dropped == ([{"prompt_id": "x", "reason": reason}] if reason else [])
    assert len(made.pairs) == len(made.texts) // 2 == len(made.encoded) // 2 == (1 if reason else 2)


def test_a_prompt_without_room_names_the_pair(policy: Policy) -> None:
    rows = [PAIRS[0], {**PAIRS[1], "prompt": "cat " * 50}]
    with pytest.raises(ValueError, match=r"mine\.jsonl: pair 2"):
        encode_pairs(policy.tokenizer, rows, max_length=12, max_prompt=40, source="mine.jsonl")


def test_strengths_are_read_where_all_pairs_have_one(policy: Policy) -> None:
    strong = [{**pair, "strength": 0.5 + i} for i, pair in enumerate(PAIRS)]
    made = encode_pairs(policy.tokenizer, strong, max_length=32).preferences()
    assert made.strength is not None
    assert made.strength.tolist() == [0.5, 1.5, 2.5]
    assert made.at([2, 0]).strength.tolist() == [2.5, 0.5]  # type: ignore[union-attr]
    assert encode_pairs(policy.tokenizer, [*strong[:2], PAIRS[2]], max_length=32).preferences().strength is None


@pytest.mark.parametrize("tokens", [False, True])
def test_a_batch_is_the_loss_on_stock_log_probabilities(policy: Policy, tokens: bool) -> None:
    ref = references(3)
    prefs = encode_pairs(policy.tokenizer, PAIRS, max_length=32).preferences(ref)
    indices = [2, 0]
    loss = losses.ld_dpo if tokens else losses.dpo
    if tokens:
        flat = [torch.full((len(r),), -1.0) for row in prefs.rows for r in row.responses]
        prefs = replace(prefs, ref=Logps.from_tokens(flat))
    of = batch_loss(policy, loss, prefs, tokens=tokens)
    total, seen = of(policy, [prefs.rows[i] for i in indices], indices)
    rows = [direct(policy, prefs.rows[i]) for i in indices]
    ours = Logps.from_tokens([one for pair in rows for one in pair])
    want = paired(ours, prefs.at(indices).ref)
    torch.testing.assert_close(total, loss(want).sum())
    assert seen["margin"].item() == pytest.approx(metrics(want)["margin"].item(), abs=1e-4)


def test_details_are_those_of_the_whole_distribution(policy: Policy, tiny: Path) -> None:
    other = Policy.load(tiny)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    prefs = encode_pairs(policy.tokenizer, PAIRS[:2], max_length=32).preferences(references(2))
    caught = []
    of = batch_loss(policy, lambda pair: caught.append(pair) or pair.chosen.sum, prefs, details=True, live=other)
    of(policy, prefs.rows, [0, 1])
    row, response = prefs.rows[0], prefs.rows[0].responses[0]
    ids = torch.tensor([[*row.prompt, *response]])
    p, q = (m.model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1) for m in (policy, other))
    assert caught[0].chosen.kl[0].item() == pytest.approx((q.exp() * (q - p)).sum().item(), rel=1e-4)
    assert caught[0].chosen.collision[0].item() == pytest.approx((2 * p).logsumexp(-1).sum().item(), rel=1e-4)


def test_running_statistics_move_in_training_only(policy: Policy) -> None:
    prefs = encode_pairs(policy.tokenizer, PAIRS, max_length=32).preferences(references(3))
    running = Running.zero()
    of = batch_loss(policy, lambda pair: losses.bco(pair, delta=None), prefs, running=running)
    policy.eval()
    of(policy, prefs.rows, [0, 1, 2])
    assert running.count.item() == 0
    policy.train()
    of(policy, prefs.rows, [0, 1, 2])
    assert running.count.item() == 1
    policy.eval()


def test_measuring_does_not_depend_on_the_budget(policy: Policy) -> None:
    prefs = encode_pairs(policy.tokenizer, PAIRS, max_length=32).preferences(references(3))
    of = batch_loss(policy, losses.dpo, prefs)
    whole, parts = (measure(policy, of, prefs.rows, size=size, budget=b) for size, b in ((3, 9999), (2, 8)))
    assert whole == pytest.approx(parts, rel=1e-5)
    assert set(whole) == {"loss", "logp_chosen", "logp_rejected", "policy_accuracy", "accuracy", "margin"}


def test_ties_count_one_half() -> None:
    same = Logps.from_sums(torch.tensor([-3.0, -3.0, -2.0, -4.0]), torch.ones(4))
    seen = metrics(paired(same, same))
    assert seen["policy_accuracy"].item() == 1.5
    assert seen["accuracy"].item() == 1.0
    assert seen["margin"].item() == 0.0


def test_value_at_the_reference(policy: Policy) -> None:
    prefs = encode_pairs(policy.tokenizer, PAIRS, max_length=32).preferences(references(3))
    assert value_at_ref(prefs, losses.ipo) == pytest.approx(25.0)
    assert value_at_ref(prefs, losses.tdpo) is None
    assert value_at_ref(Preferences(prefs.rows), losses.dpo) is None


def test_the_reference_that_likes_all_alike(policy: Policy) -> None:
    made = encode_pairs(policy.tokenizer, PAIRS, max_length=32)
    prefs = made.preferences(made.zeros(tokens=True))
    of, free = batch_loss(policy, losses.dpo, prefs), batch_loss(policy, losses.posterior, Preferences(prefs.rows))
    assert of(policy, prefs.rows, [0, 1, 2])[0].item() == pytest.approx(free(policy, prefs.rows, [0, 1, 2])[0].item())
