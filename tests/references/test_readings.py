"""Texts as a scorer reads them: distinct ones once, limits marked, priors without their prompts."""

from __future__ import annotations

import pytest
from reading import each

from pyrite.models.policy import Policy
from pyrite.models.references import cut_prompts, limits, read

from .conftest import TEMPLATE, Text, encode, id_of, said


def test_limits_are_those_of_training() -> None:
    assert limits(64, None, None) == (64, 48)
    assert limits(64, 40, None) == (40, 30)
    assert limits(64, None, 10) == (64, 10)


def test_reading_is_encoding_each_distinct_text_once(policy: Policy, texts: list[Text]) -> None:
    reading = read(policy.tokenizer, said([*texts, *texts[:5]]), conditioning="prompt", max_length=64, max_prompt=48)
    assert each(reading.said) == each(encode(policy.tokenizer, texts))
    assert reading.ids == [id_of(one) for one in texts]
    assert not any(reading.cut)
    known = read(policy.tokenizer, reading.said, conditioning="prompt", max_length=64, max_prompt=48, known=True)
    assert (known.recipe, known.data, each(known.said)) == (reading.recipe, reading.data, each(reading.said))


def test_cut_prompts_and_answers_are_marked(policy: Policy) -> None:
    texts = [Text("tell me about the cat", "the cat sat on the mat"), Text("a cat", "a dog")]
    reading = read(policy.tokenizer, said(texts), conditioning="prompt", max_length=8, max_prompt=4)
    assert [len(one.prompt) for one in each(reading.said)] == [4, 3]
    assert reading.cut == [True, False] == cut_prompts(policy.tokenizer, reading.said)
    assert [one.truncated for one in each(reading.said)] == [True, False]


def test_a_prior_reads_the_answer_alone(policy: Policy) -> None:
    texts = [Text("a cat", "a dog"), Text("the mat", "a dog"), Text("a cat", "the cat sat on the mat", finished=False)]
    reading = read(policy.tokenizer, said(texts), conditioning="prior", max_length=6, max_prompt=4)
    start = policy.tokenizer.bos_token_id
    assert [one.prompt for one in each(reading.said)] == [[start]] * 3
    assert reading.ids == [id_of(texts[i]) for i in (0, 2, 1)]  # answers to a prompt side by side
    assert each(reading.said)[0].response == each(reading.said)[2].response
    assert [one.truncated for one in each(reading.said)] == [False, True, False]
    assert reading.recipe["conditioning"] == {"kind": "prior", "header": "<bos>", "ids": [start]}
    policy.tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="max_prompt 1 leaves no room for the 2 tokens a prior begins with"):
        read(policy.tokenizer, said(texts), conditioning="prior", max_length=9, max_prompt=1)


def test_a_prompt_that_leaves_no_room_is_named(policy: Policy) -> None:
    with pytest.raises(ValueError, match="the answer 'b' to 'a cat sat': the prompt has 4 tokens"):
        read(
            policy.tokenizer,
            said([Text("a", "b"), Text("a cat sat", "b")]),
            conditioning="prompt",
            max_length=4,
            max_prompt=4,
        )
