import doctest

import pytest
import torch

import pyrite.math.logps
from pyrite.math.logps import Logps, PairLogps, Running


def rows(*lengths: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [-torch.rand(length, generator=generator).to(dtype) - 0.1 for length in lengths]


def test_examples():
    result = doctest.testmod(pyrite.math.logps, extraglobs={"torch": torch})
    assert result.attempted and not result.failed


def test_from_tokens_pads_and_sums():
    given = rows(3, 1, 5)
    logps = Logps.from_tokens(given)
    assert logps.tokens is not None and logps.mask is not None
    assert logps.tokens.shape == logps.mask.shape == (3, 5)
    assert logps.length.tolist() == logps.mask.sum(1).tolist() == [3, 1, 5]
    assert (logps.tokens[~logps.mask] == 0).all()
    for row, tokens, mask in zip(given, logps.tokens, logps.mask, strict=True):
        assert torch.equal(tokens[mask], row)
    torch.testing.assert_close(logps.sum, torch.stack([row.sum() for row in given]))
    torch.testing.assert_close(logps.mean, torch.stack([row.mean() for row in given]))


def test_sums_accumulate_in_float64():
    values = [-4096.0] + [-(2.0**-12)] * 4096  # in float32 each small term vanishes beside the large one
    logps = Logps.from_tokens([torch.tensor(values)])
    assert logps.sum.dtype == torch.float32
    assert logps.sum.item() == -4097.0


@pytest.mark.parametrize("given, returned", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_sums_keep_the_dtype_but_never_a_half(given, returned):
    assert Logps.from_tokens(rows(4, 2, dtype=given)).sum.dtype == returned


def test_gradient_reaches_each_token_once():
    given = [row.requires_grad_() for row in rows(3, 2)]
    Logps.from_tokens(given).sum.sum().backward()
    for row in given:
        assert row.grad is not None and torch.equal(row.grad, torch.ones_like(row))


@pytest.mark.parametrize(
    "bad, message",
    [
        ([], "no responses"),
        ([torch.zeros(2), torch.zeros(2, 2)], "response 1 is torch.float32 of shape \\(2, 2\\)"),
        ([torch.tensor([1, 2])], "response 0 is torch.int64"),
        ([torch.zeros(2), torch.zeros(0)], "response 1 has no tokens"),
        (
            [torch.zeros(2), torch.zeros(2).double()],
            "response 1 is torch.float64 and response 0 torch.float32",
        ),
    ],
)
def test_from_tokens_refuses(bad, message):
    with pytest.raises(ValueError, match=message):
        Logps.from_tokens(bad)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sum": torch.zeros(2), "length": torch.ones(3)}, "both must be \\(N,\\)"),
        ({"sum": torch.zeros(2, 1), "length": torch.ones(2, 1)}, "both must be \\(N,\\)"),
        ({"sum": torch.zeros(2).bfloat16(), "length": torch.ones(2)}, "bfloat16 rounds"),
        ({"sum": torch.zeros(2), "length": torch.ones(2), "tokens": torch.zeros(2, 1)}, "come together"),
        (
            {
                "sum": torch.zeros(2),
                "length": torch.ones(2),
                "tokens": torch.zeros(3, 1),
                "mask": torch.ones(3, 1).bool(),
            },
            "must both be \\(2, T\\)",
        ),
        ({"sum": torch.zeros(2), "length": torch.ones(2), "kl": torch.zeros(3)}, "kl has shape \\(3,\\)"),
        ({"sum": torch.zeros(2), "length": torch.ones(2), "collision": torch.zeros(2, 1)}, "collision has shape"),
    ],
)
def test_logps_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        Logps(**fields)


@pytest.mark.parametrize("value, length", [(float("nan"), 3), (-float("inf"), 3), (0.5, 3), (0.0, 0)])
def test_checked_names_the_row(value, length):
    good = Logps.from_sums(torch.tensor([-1.0, -2.0]), torch.tensor([1, 2]))
    assert good.checked() is good
    bad = Logps.from_sums(torch.tensor([-1.0, value]), torch.tensor([1, length]))
    with pytest.raises(ValueError, match="reference: row 1 has sum"):
        bad.checked("reference")


def test_pairs_refuse_what_does_not_match():
    two, three = Logps.from_tokens(rows(2, 2)), Logps.from_tokens(rows(1, 1, 1))
    assert len(PairLogps(two, two, two, two, strength=torch.ones(2))) == 2
    with pytest.raises(ValueError, match="2 chosen responses but 3 in rejected"):
        PairLogps(two, three)
    with pytest.raises(ValueError, match="but 3 in ref_rejected"):
        PairLogps(two, two, two, three)
    with pytest.raises(ValueError, match="ref_rejected is missing"):
        PairLogps(two, two, two)
    with pytest.raises(ValueError, match="strength has shape"):
        PairLogps(two, two, strength=torch.ones(3))


def test_sums_of_another_tokenizer_say_so():
    nats, length = torch.tensor([-1.0, -2.0]), torch.tensor([1, 2])
    assert Logps.from_sums(nats, length).aligned and Logps.from_tokens(rows(2)).aligned
    assert not Logps.from_sums(nats, length, aligned=False).aligned


def test_statistics_start_at_zero_in_double():
    first, second = Running.zero(), Running.zero()
    for name in ("ratio", "margin", "count"):
        value = getattr(first, name)
        assert value.shape == () and value.dtype == torch.float64 and value.item() == 0
        assert value is not getattr(second, name)
