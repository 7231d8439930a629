import pytest
import torch

from pyrite.core import specs
from pyrite.feedback import scorers

TEXTS = [f"word{i} fox velvet the" for i in range(400)]
PROMPTS = [f"prompt {i % 7}" for i in range(400)]


def test_weighted_sum_is_the_sum():
    made = scorers.weighted_sum(golds=["length(unit='chars')", "word_collector(words='toy')"], weights=[-0.25, 3.0])
    want = -0.25 * scorers.length(unit="chars")(PROMPTS, TEXTS) + 3 * scorers.word_collector(words="toy")(
        PROMPTS, TEXTS
    )
    torch.testing.assert_close(made(PROMPTS, TEXTS), want)


@pytest.mark.parametrize(
    ("names", "weights"), [([], []), (["length()"], []), (["length()"], [1, 2]), ("length()", [1] * 8)]
)
def test_weighted_sum_needs_one_weight_each(names, weights):
    with pytest.raises(ValueError, match="as many weights as golds"):
        scorers.weighted_sum(golds=names, weights=weights)


def test_noise_belongs_to_seed_prompt_and_text():
    score = scorers.noisy(gold="length()", sd=1.0, seed=3)
    first = score(PROMPTS, TEXTS)
    assert torch.equal(first, scorers.noisy(gold="length()", sd=1.0, seed=3)(PROMPTS, TEXTS))
    assert torch.equal(first.flip(0), score(PROMPTS[::-1], TEXTS[::-1]))
    assert not torch.isclose(first, scorers.noisy(gold="length()", sd=1.0, seed=4)(PROMPTS, TEXTS)).any()
    assert not torch.isclose(first, score(["another"] * 400, TEXTS)).any()


def test_noise_is_standard_normal_and_scaled():
    """400 draws: mean within 4.5 standard errors, spread too; sd is a factor."""
    noise = scorers.noisy(gold="length()", sd=1.0)(PROMPTS, TEXTS) - 4
    assert noise.mean().abs() < 4.5 / 20
    assert (noise.std() - 1).abs() < 4.5 / 28
    torch.testing.assert_close(scorers.noisy(gold="length()", sd=2.5)(PROMPTS, TEXTS) - 4, 2.5 * noise)
    assert scorers.noisy(gold="length()", sd=0.0)(PROMPTS, TEXTS).tolist() == [4.0] * 400
    with pytest.raises(ValueError, match="sd=-1"):
        scorers.noisy(gold="length()", sd=-1)


def test_truncated_reads_the_first_words_of_the_response():
    long = " ".join(f"w{i}" for i in range(60)) + " data"
    score = scorers.truncated(gold="word_collector()")
    prompts = ["hope " * 70] * 3
    assert score(prompts, [f"data {long}", long, "data"]).tolist() == [1, 0, 1]
    assert scorers.truncated(gold="with_prompt(gold='length()')", words=2)(["a b c"], [long]).item() == 5
    spaced = scorers.truncated(gold="length(unit='chars')", words=2)
    assert spaced([""] * 4, [" a  bc\td ", "a  bc ", "", "a b"]).tolist() == [6, 6, 0, 3]
    with pytest.raises(ValueError, match="words=0"):
        scorers.truncated(gold="length()", words=0)


def test_golds_nest_as_spec_strings():
    made = specs.part(
        """noisy(gold="weighted_sum(golds=['truncated(gold=\\"length()\\", words=3)'], weights=[2])", sd=0.0)""",
        scorers,
    )
    assert made([""], ["a b c d e"]).item() == 6


@pytest.mark.parametrize("factory", [scorers.noisy, scorers.truncated, scorers.with_prompt])
def test_a_bad_gold_inside_is_refused_at_once(factory, tmp_path):
    options = {"sd": 1.0} if factory is scorers.noisy else {}
    with pytest.raises(ValueError, match="unknown name 'lenth': did you mean length"):
        factory(gold="lenth()", **options)
    (tmp_path / "bad.py").write_text(
        "import torch\ndef nan(prompts, responses):\n    return torch.tensor([float('nan')])\n"
    )
    with pytest.raises(ValueError, match="scored row 1 of 1 as nan"):
        factory(gold=f"{tmp_path}/bad.py:nan()", **options)([""], ["a"])
