import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pyrite.data import text
from pyrite.feedback import scorers
from pyrite.feedback.scorers import turns
from pyrite.models.policy import RewardModel

PROMPTS = ["tell me about the cat", "tell me about the cat", "the big red tree", "on"]
RESPONSES = ["the cat sat .", "a dog", "small bird sang in the tree and ran .", "blue"]
TALK = [
    {"role": "user", "content": "write about a fox in the forest ."},
    {"role": "assistant", "content": "the fox slept ."},
    {"role": "user", "content": "a dog , garden ."},
]


def by_hand(folder, prompt: str, response: str) -> torch.Tensor:
    """Mean log-probability of the response's tokens from the model's own logits."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    front = [tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]
    back = tokenizer(response)["input_ids"]
    with torch.no_grad():
        logps = model(torch.tensor([front + back])).logits[0].log_softmax(-1)
    return torch.stack([logps[len(front) + i - 1, token] for i, token in enumerate(back)]).mean()


def test_distillation_is_the_difference_of_mean_log_likelihoods(tiny, other):
    want = [by_hand(tiny, p, y) - by_hand(other, p, y) for p, y in zip(PROMPTS, RESPONSES, strict=True)]
    score = scorers.distillation(strong=str(tiny), weak=str(other))
    torch.testing.assert_close(score(PROMPTS, RESPONSES), torch.stack(want), atol=1e-5, rtol=1e-5)
    assert score(["on"], [""]).item() == 0
    assert score(["on", "on"], ["", "blue"])[1] == score(["on"], ["blue"])[0]


def test_distillation_alone_and_in_any_batch(tiny, other):
    score = scorers.distillation(strong=str(tiny), weak=str(other))
    together = score(PROMPTS, RESPONSES)
    assert together.std() > 0.1  # otherwise nothing could differ
    for some in ([2], [0, 3], [3, 1, 1, 0]):
        got = score([PROMPTS[i] for i in some], [RESPONSES[i] for i in some])
        torch.testing.assert_close(got, together[some], atol=1e-5, rtol=1e-5)


def test_equal_models_score_exactly_zero_and_swapping_flips_the_sign(tiny, other, tmp_path):
    shutil.copytree(tiny, tmp_path / "copy")
    for weak in (tiny, tmp_path / "copy"):
        assert scorers.distillation(strong=str(tiny), weak=str(weak))(PROMPTS, RESPONSES).tolist() == [0.0] * 4
    there = scorers.distillation(strong=str(tiny), weak=str(other))(PROMPTS, RESPONSES)
    back = scorers.distillation(strong=str(other), weak=str(tiny))(PROMPTS, RESPONSES)
    assert torch.equal(there, -back) and there.abs().min() > 0


def test_distillation_reads_the_prompt_as_well_if_told(tiny, other):
    pair = f"strong={str(tiny)!r}, weak={str(other)!r}"
    whole = scorers.with_prompt(gold=f"distillation({pair})")(["the cat"], ["sat on"])
    assert whole.item() == pytest.approx(
        (by_hand(tiny, "", "the cat sat on") - by_hand(other, "", "the cat sat on")).item(), abs=1e-5
    )


def test_a_text_too_long_for_a_model_is_refused(tiny, other):
    with pytest.raises(ValueError, match=r"row 2: .* 64 tokens"):
        scorers.distillation(strong=str(tiny), weak=str(other))(["on", "on"], ["cat", "cat " * 70])


def test_models_are_loaded_at_the_first_text_and_once(chat_reward, monkeypatch):
    nowhere = scorers.reward_model(path="no/such/model"), scorers.distillation(strong="no/a", weak="no/b")
    for score in nowhere:
        assert score([], []).shape == (0,)
        with pytest.raises(ValueError, match="no/"):
            score(["a"], ["b"])
    loads = []
    load = RewardModel.load
    monkeypatch.setattr(RewardModel, "load", lambda path: loads.append(path) or load(path))
    score = scorers.reward_model(path=str(chat_reward))
    assert torch.equal(score(["a fox , forest ."], ["the fox"]), score(["a fox , forest ."], ["the fox"]))
    assert loads == [str(chat_reward)]


def test_reward_model_reads_prompts_in_its_chat_template(chat_reward):
    model = AutoModelForSequenceClassification.from_pretrained(chat_reward).eval()
    tokenizer = AutoTokenizer.from_pretrained(chat_reward)

    def template(messages, response):
        said = [*messages, {"role": "assistant", "content": response}]
        ids = tokenizer.apply_chat_template(said, tokenize=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return model(ids).logits.item()

    score = scorers.reward_model(path=str(chat_reward))
    said = ["the dog ran .", "hello my friend !"]
    want = [template(TALK[:1], said[0]), template(TALK, said[1])]
    assert score([text.plain(TALK[:1]), text.plain(TALK)], said).tolist() == pytest.approx(want, abs=1e-4)
    one_turn = [{"role": "user", "content": text.plain(TALK)}]
    assert abs(template(one_turn, said[1]) - want[1]) > 1e-2  # the transcript as one turn is another text


def test_reward_model_without_template_reads_the_text(tiny, tmp_path):
    RewardModel.load(tiny, head_seed=0, head_std=0.5).save(tmp_path)
    score = scorers.reward_model(path=str(tmp_path))
    torch.testing.assert_close(score(PROMPTS, RESPONSES), RewardModel.load(tmp_path).scores(PROMPTS, RESPONSES))


@pytest.mark.parametrize("messages", [TALK, TALK[1:], [{"role": "system", "content": "be\n\nkind"}, *TALK]])
def test_a_conversation_survives_its_text_form(messages):
    assert turns(text.plain(messages)) == messages


@pytest.mark.parametrize(
    "prompt", ["", "a fox", "Human:\n", "Human:\nhi", "so: Human:\nhi\n\nAssistant:\n", "Assistant:\n"]
)
def test_any_other_prompt_is_its_own(prompt):
    assert turns(prompt) == prompt
