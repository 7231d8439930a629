"""Pairs as a policy learns from them: what is dropped, the loss of a batch against stock models, metrics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reading import Read, each

from pyrite.math import losses
from pyrite.math.logps import Logps, PairLogps, Running
from pyrite.models.forward import Packed
from pyrite.models.policy import Policy
from pyrite.training.pairs import Preferences, batch_loss, encode_pairs, measure, metrics, value_at_ref

PAIRS = [
    {"prompt_id": "a", "prompt": "tell me", "chosen": "the cat sat", "rejected": "a dog"},
    {"prompt_id": "b", "prompt": "tell me about", "chosen": "a bird sang on a tree", "rejected": "the mat"},
    {"prompt_id": "c", "prompt": "please", "chosen": "red", "rejected": "blue and big"},
]


@pytest.fixture(scope="module")
def policy(tiny: Path) -> Policy:
    return Policy.load(tiny)


def direct(policy: Policy, one: Read) -> torch.Tensor:
    """Token log-probabilities of a response by the stock model."""
    logp = policy.model(input_ids=torch.tensor([one.ids])).logits[0].log_softmax(-1)
    return logp[len(one.prompt) - 1 : -1].gather(1, torch.tensor(one.response)[:, None]).squeeze(1)


def packed(policy: Policy, prefs: Preferences, pairs: list[int]) -> Packed:
    return policy.pack(prefs.responses, prefs.at(pairs).groups)


def references(n: int) -> Logps:
    drawn = -torch.rand(2 * n, generator=torch.Generator().manual_seed(0)) * 20
    return Logps.from_sums(drawn, torch.ones(2 * n))


def test_rows_hold_prompt_chosen_rejected(policy: Policy) -> None:
    made = encode_pairs(policy.tokenizer, PAIRS, max_length=32)
    assert made.dropped == []
    chosen, rejected = (each(made.responses)[int(side[0])] for side in (made.chosen, made.rejected))
    assert policy.tokenizer.decode(chosen.prompt) == policy.tokenizer.decode(rejected.prompt) == "<bos> tell me"
    said = [policy.tokenizer.decode(one.response) for one in (chosen, rejected)]
    assert said == ["the cat sat <eos>", "a dog <eos>"]
    assert made.strength is None and made.pairs == PAIRS


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
    assert len(made) == len(made.pairs) == len(made.responses) // 2 == (1 if reason else 2)


def test_a_prompt_without_room_names_the_pair(policy: Policy) -> None:
    rows = [PAIRS[0], {**PAIRS[1], "prompt": "cat " * 50}]
    with pytest.raises(ValueError, match=r"mine\.jsonl: pair 2"):
        encode_pairs(policy.tokenizer, rows, max_length=12, max_prompt=40, source="mine.jsonl")


def test_strengths_are_read_where_all_pairs_have_one(policy: Policy) -> None:
    strong = [{**pair, "strength": 0.5 + i} for i, pair in enumerate(PAIRS)]
    made = encode_pairs(policy.tokenizer, strong, max_length=32)
    assert made.strength is not None
    assert made.strength.tolist() == [0.5, 1.5, 2.5]
    assert made.at([2, 0]).strength.tolist() == [2.5, 0.5]  # type: ignore[union-attr]
    assert encode_pairs(policy.tokenizer, [*strong[:2], PAIRS[2]], max_length=32).strength is None


def test_the_reference_stays_with_its_pairs_where_some_are_dropped(policy: Policy) -> None:
    """A pair that its reference cannot score is left out; the others keep their own log-probabilities."""
    whole = replace(encode_pairs(policy.tokenizer, PAIRS, max_length=32), ref=references(3))
    left = whole.without([None, "R3: truncation cut the answer", None])
    assert [pair["prompt_id"] for pair in left.pairs] == ["a", "c"]
    assert left.dropped == [{"prompt_id": "b", "reason": "R3: truncation cut the answer"}]
    assert left.ref is not None and whole.ref is not None
    for side, was in ((left.chosen, whole.chosen), (left.rejected, whole.rejected)):
        assert torch.equal(left.ref.sum[side], whole.ref.sum[was][[0, 2]])
        said = each(whole.responses)
        assert [each(left.responses)[i] for i in side] == [said[i] for i in was[[0, 2]]]


@pytest.mark.parametrize("tokens", [False, True])
def test_a_batch_is_the_loss_on_stock_log_probabilities(policy: Policy, tokens: bool) -> None:
    ref = references(3)
    prefs = replace(encode_pairs(policy.tokenizer, PAIRS, max_length=32), ref=ref)
    indices = [2, 0]
    loss = losses.ld_dpo if tokens else losses.dpo
    if tokens:
        flat = [torch.full((length,), -1.0) for length in prefs.responses.lengths.tolist()]
        prefs = replace(prefs, ref=Logps.from_tokens(flat))
    of = batch_loss(policy, loss, prefs, wanted=frozenset({"tokens"} if tokens else ()))
    total, seen = of(policy, packed(policy, prefs, indices), indices)
    ours, some = Logps.from_tokens([direct(policy, one) for one in each(prefs.responses)]), prefs.at(indices)
    assert some.ref is not None
    want = PairLogps(*(logps.at(side) for logps in (ours, some.ref) for side in (some.chosen, some.rejected)))
    torch.testing.assert_close(total, loss(want).sum())
    assert seen["margin"].item() == pytest.approx(metrics(want)["margin"].item(), abs=1e-4)


def test_details_are_those_of_the_whole_distribution(policy: Policy, tiny: Path) -> None:
    other = Policy.load(tiny)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    prefs = replace(encode_pairs(policy.tokenizer, PAIRS[:2], max_length=32), ref=references(2))
    caught = []
    of = batch_loss(
        policy, lambda pair: caught.append(pair) or pair.chosen.sum, prefs, wanted=frozenset({"kl"}), live=other
    )
    of(policy, packed(policy, prefs, [0, 1]), [0, 1])
    one = each(prefs.responses)[0]
    ids = torch.tensor([one.ids])
    p, q = (m.model(input_ids=ids).logits[0, len(one.prompt) - 1 : -1].log_softmax(-1) for m in (policy, other))
    assert caught[0].chosen.kl[0].item() == pytest.approx((q.exp() * (q - p)).sum().item(), rel=1e-4)
    assert caught[0].chosen.collision[0].item() == pytest.approx((2 * p).logsumexp(-1).sum().item(), rel=1e-4)


def test_running_statistics_move_in_training_only(policy: Policy) -> None:
    prefs = replace(encode_pairs(policy.tokenizer, PAIRS, max_length=32), ref=references(3))
    running = Running.zero()
    of = batch_loss(policy, lambda pair: losses.bco(pair, delta=None), prefs, running=running)
    policy.eval()
    of(policy, packed(policy, prefs, [0, 1, 2]), [0, 1, 2])
    assert running.count.item() == 0
    policy.train()
    of(policy, packed(policy, prefs, [0, 1, 2]), [0, 1, 2])
    assert running.count.item() == 1
    policy.eval()


def test_measuring_does_not_depend_on_the_budget(policy: Policy) -> None:
    prefs = replace(encode_pairs(policy.tokenizer, PAIRS, max_length=32), ref=references(3))
    of = batch_loss(policy, losses.dpo, prefs)
    whole, parts = (measure(policy, of, prefs, size=size, budget=b) for size, b in ((3, 9999), (2, 8)))
    assert whole == pytest.approx(parts, rel=1e-5)
    assert set(whole) == {"loss", "logp_chosen", "logp_rejected", "policy_accuracy", "accuracy", "margin"}


def test_ties_count_one_half() -> None:
    same = Logps.from_sums(torch.tensor([-3.0, -3.0, -2.0, -4.0]), torch.ones(4))
    sides = same.at(slice(0, None, 2)), same.at(slice(1, None, 2))
    seen = metrics(PairLogps(*sides, *sides))
    assert seen["policy_accuracy"].item() == 1.5
    assert seen["accuracy"].item() == 1.0
    assert seen["margin"].item() == 0.0


def test_value_at_the_reference(policy: Policy) -> None:
    prefs = replace(encode_pairs(policy.tokenizer, PAIRS, max_length=32), ref=references(3))
    assert value_at_ref(prefs, losses.ipo) == pytest.approx(25.0)
    assert value_at_ref(prefs, losses.tdpo) is None
    assert value_at_ref(replace(prefs, ref=None), losses.dpo) is None


def test_the_reference_that_likes_all_alike(policy: Policy) -> None:
    made = encode_pairs(policy.tokenizer, PAIRS, max_length=32)
    prefs = replace(made, ref=made.zeros(tokens=True))
    of, free = batch_loss(policy, losses.dpo, prefs), batch_loss(policy, losses.posterior, made)
    batch = packed(policy, prefs, [0, 1, 2])
    assert of(policy, batch, [0, 1, 2])[0].item() == pytest.approx(free(policy, batch, [0, 1, 2])[0].item())
