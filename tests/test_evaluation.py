"""Gold, proxy and KL of a policy's answers; the job's own tests cover the numbers from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import Row, read_rows

from pyrite.data import rows as data
from pyrite.feedback.ledger import GoldLimits
from pyrite.models.policy import Policy, RewardModel
from pyrite.training.evaluation import Evaluation, Evaluator, divergences


@pytest.fixture
def asked(demos: Path, tmp_path: Path) -> Evaluation:
    data.write(data.load(demos, "demos")[:5], tmp_path / "few.jsonl")
    return Evaluation(eval_prompts=str(tmp_path / "few.jsonl"), gold="length()", eval_k=3, max_new_tokens=6)


@pytest.fixture(scope="module")
def policy(tiny: Path) -> Policy:
    return Policy.load(tiny)


def test_the_three_numbers(asked: Evaluation, policy: Policy, tiny: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    RewardModel.load(tiny, head_seed=0).save(tmp_path / "rewards")
    asked = replace(asked, proxy=str(tmp_path / "rewards"))
    answers = Evaluator.load(asked, policy, ref=str(tiny), seed=0)(policy)
    assert len(answers.responses) == 15
    assert all(len(value) == 15 for value in answers.values.values())
    assert answers.values["kl_k1"].abs().max() < 1e-4  # against itself
    want = [float(len(said.split())) for said in answers.responses.texts]
    assert answers.values["gold"].tolist() == want
    summary = answers.summary()
    means = torch.tensor(want, dtype=torch.float64).view(5, 3).mean(1)
    assert summary["gold"] == pytest.approx({"mean": means.mean().item(), "se": means.std().item() / 5**0.5})
    assert set(summary) == {"gold", "proxy", "kl_k1", "kl_k3", "length", "missing_eos"}


def test_kl_uses_the_sampled_tokens(asked: Evaluation, policy: Policy, tiny: Path, tmp_path: Path) -> None:
    other = Policy.load(tiny)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    other.save(tmp_path / "other")
    made = Evaluator.load(asked, policy, ref=str(tmp_path / "other"), seed=0)
    answers = made(policy)
    ratio = read_rows(policy, answers.responses).sum - read_rows(other, answers.responses).sum
    torch.testing.assert_close(answers.values["kl_k1"], ratio.double(), atol=1e-3, rtol=1e-3)
    assert answers.values["kl_k3"].min() >= -1e-6


def test_the_same_seed_gives_the_same_answers(asked: Evaluation, policy: Policy) -> None:
    one, two, other = (Evaluator.load(asked, policy, ref=None, seed=seed)(policy).responses.texts for seed in (0, 0, 1))
    assert one == two
    assert one != other


def test_a_scorer_is_tried_on_a_real_prompt(asked: Evaluation, policy: Policy, tmp_path: Path) -> None:
    from dataclasses import replace

    (tmp_path / "picky.py").write_text(
        "import torch\ndef score(prompts, responses):\n"
        "    assert all(p.startswith('tell me') for p in prompts), prompts\n    return torch.ones(len(prompts))\n"
    )
    made = Evaluator.load(replace(asked, gold=f"{tmp_path}/picky.py:score()"), policy, ref=None, seed=0)
    assert made(policy).values["gold"].tolist() == [1.0] * 15


def test_kl_is_unbiased_on_an_enumerable_model(asked: Evaluation, policy: Policy, tiny: Path, tmp_path: Path) -> None:
    """Every answer of at most two tokens; the control is a known mistake, answers drawn colder than they are scored."""
    from dataclasses import replace

    other, sharp = Policy.load(tiny), Policy.load(tiny)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
        sharp.model.get_output_embeddings().weight.mul_(2)  # type: ignore[union-attr,operator]
    asked = replace(asked, eval_limit=1, eval_k=3000, max_new_tokens=2)
    made = Evaluator.load(asked, policy, ref=other, seed=0)
    exact = _exact_kl(policy, other, made.ids[0])
    assert exact > 0.1
    for name in ("kl_k1", "kl_k3"):
        values = made(policy).values[name]
        assert abs(values.mean().item() - exact) < 3 * values.std().item() / 3000**0.5
    wanted = replace(made, exact=True)
    values, k1 = (wanted(policy).values[name] for name in ("kl_exact", "kl_k1"))
    assert abs(values.mean().item() - exact) < 3 * values.std().item() / 3000**0.5
    assert values.std() < 0.7 * k1.std()
    turned = divergences(other, policy, wanted(policy).responses)
    reverse = torch.stack([row.double().sum() for row in turned.kl])
    assert abs(reverse.mean().item() - exact) > 5 * reverse.std().item() / 3000**0.5
    drawn = made(sharp).responses.tokens()
    ours, theirs = (read_rows(model, [Row(made.ids[0], drawn)]).sum.double() for model in (policy, other))
    values = ours - theirs
    assert abs(values.mean().item() - exact) > 5 * values.std().item() / 3000**0.5


def test_exact_values_are_those_by_hand_and_leave_the_others_as_they_were(
    asked: Evaluation, policy: Policy, tiny: Path
) -> None:
    """Answers of one token: the KL has no error at all, and is the same for every answer to a prompt."""
    from dataclasses import replace

    other = Policy.load(tiny)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    plain = Evaluator.load(replace(asked, max_new_tokens=1), policy, ref=other, seed=0)
    before, after = plain(policy), replace(plain, exact=True)(policy)
    assert before.exact is None and after.exact is not None
    assert after.values.keys() - before.values.keys() == {"kl_exact", "entropy_exact"}
    for name, values in before.values.items():
        torch.testing.assert_close(after.values[name], values, atol=1e-5, rtol=1e-5)
    for p, ids in enumerate(plain.ids):
        ours, theirs = (m.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1) for m in (policy, other))
        kl, entropy = (ours.exp() * (ours - theirs)).sum().item(), -(ours.exp() * ours).sum().item()
        assert after.values["kl_exact"][3 * p : 3 * p + 3].tolist() == pytest.approx([kl] * 3, abs=1e-5)
        assert after.values["entropy_exact"][3 * p : 3 * p + 3].tolist() == pytest.approx([entropy] * 3, abs=1e-5)


def test_gold_that_is_not_known_is_left_out(asked: Evaluation, policy: Policy) -> None:
    from dataclasses import replace

    answers = Evaluator.load(asked, policy, ref=None, seed=0)(policy, gold=False)
    assert "gold" not in answers.values
    gold = torch.arange(15.0)
    gold[[0, 3, 4, 5]] = float("nan")  # of prompt 0 one answer, of prompt 1 all
    summary = replace(answers, values={"gold": gold, "proxy": gold}).summary()
    means = torch.tensor([1.5, 7.0, 10.0, 13.0], dtype=torch.float64)
    assert summary["gold"] == pytest.approx({"mean": means.mean().item(), "se": means.std().item() / 2})
    assert summary["proxy"]["mean"] != summary["proxy"]["mean"]  # of anything else NaN is an error that shows


def test_a_gold_that_costs_something_is_not_tried(asked: Evaluation, policy: Policy, tmp_path: Path) -> None:
    from dataclasses import replace

    (tmp_path / "dear.py").write_text("def score(prompts, responses):\n    raise RuntimeError('paid')\n")
    dear = replace(asked, gold=f"{tmp_path}/dear.py:score()")
    Evaluator.load(dear, policy, ref=None, seed=0, asking=GoldLimits(budget=3))
    with pytest.raises(ValueError, match=r"dear\.py:2, score\(\): RuntimeError: paid"):
        Evaluator.load(dear, policy, ref=None, seed=0)
    with pytest.raises(ValueError, match="give --gold too"):
        Evaluator.load(replace(asked, gold=None), policy, ref=None, seed=0, asking=GoldLimits(every=2))


def _exact_kl(policy: Policy, ref: Policy, prompt: list[int]) -> float:
    size, eos = len(policy.tokenizer), policy.tokenizer.eos_token_id
    every = [[eos]] + [[a, b] for a in range(size) if a != eos for b in range(size)]
    ours, theirs = (read_rows(model, [Row(prompt, every)]).sum.double() for model in (policy, ref))
    assert ours.exp().sum().item() == pytest.approx(1, abs=1e-5)
    return (ours.exp() * (ours - theirs)).sum().item()
