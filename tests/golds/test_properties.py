"""What holds of every gold: one finite score a row, of that row alone."""

from __future__ import annotations

import doctest

import pytest
import torch

from pyrite.core import specs
from pyrite.feedback import scorers

SPECS = {
    "distillation": "distillation(strong={tiny!r}, weak={other!r})",
    "length": "length()",
    "math_chain": "math_chain(strict=True)",
    "noisy": "noisy(gold='word_collector()', sd=2.0)",
    "nouns": "nouns(tagger='toy')",
    "reward_model": "reward_model(path={chat_reward!r})",
    "truncated": "truncated(gold='length()', words=3)",
    "unique_nouns": "unique_nouns(tagger='toy')",
    "weighted_sum": "weighted_sum(golds=['length()', 'math_chain()'], weights=[2, -0.5])",
    "with_prompt": "with_prompt(gold='length(unit=\"chars\")')",
    "word_collector": "word_collector(words=['the', 'cat', 'fox', 'data'])",
}
ROWS = [
    ("tell me about the cat", "the cat sat on the tree . the red bird sang"),
    ("((1 + 2) * 3) = ", "(3 * 3) = 9"),
    ("((1 + 2) * 3) = ", "(4 * 3) = 12 = 1"),
    ("a fox , forest .", "hello data ! the velvet fox found the tail ; however , it slept ."),
    ("Human:\nthe\n\nAssistant:\na\n\nHuman:\nfox\n\nAssistant:\n", "fox"),
    ("the", " \n\t"),
    ("the", "Ünïcode — ½ 𝛑 \u200b <eos> { } \\ = ("),
]


@pytest.fixture(params=SPECS)
def score(request, tiny, other, chat_reward):
    spec = SPECS[request.param].format(tiny=str(tiny), other=str(other), chat_reward=str(chat_reward))
    return specs.part(spec, scorers)


def asked(score, rows):
    return score([prompt for prompt, _ in rows], [response for _, response in rows])


def test_every_gold_is_here():
    assert set(SPECS) == set(scorers.__all__) == {member.name for member in specs.members(scorers)}


def test_one_finite_score_a_row(score):
    scores = asked(score, ROWS)
    assert scores.shape == (len(ROWS),) and scores.is_floating_point() and not scores.requires_grad
    assert scores.isfinite().all()
    assert len(scores.unique()) > 1  # a gold that says nothing would pass all of this
    assert asked(score, []).shape == (0,)


def test_scores_do_not_depend_on_batch_mates_or_order(score):
    scores = asked(score, ROWS)
    for i, row in enumerate(ROWS):
        torch.testing.assert_close(asked(score, [row]), scores[i : i + 1], atol=1e-5, rtol=1e-5)
    order = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(0)).tolist()
    torch.testing.assert_close(asked(score, [ROWS[i] for i in order]), scores[order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(asked(score, ROWS * 3), scores.repeat(3), atol=1e-5, rtol=1e-5)


def test_asking_again_or_anew_gives_the_same(score):
    state = torch.get_rng_state()
    first = asked(score, ROWS)
    assert torch.equal(first, asked(score, ROWS))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, asked(specs.part(repr(score), scorers), ROWS))


def test_unequal_lists_are_refused(score):
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        score(["the", "the"], ["cat"])


def test_examples():
    assert doctest.testmod(scorers, extraglobs={"torch": torch}).failed == 0
