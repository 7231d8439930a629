import pytest
import torch

from pyrite.math.losses import dpo, f_dpo

from .fixtures import F64, pair_of, pair_with, random_rows

DERIVATIVES = {  # f'(t) as the paper's table has it
    ("reverse_kl", 0.5): lambda t: t.log(),
    ("forward_kl", 0.5): lambda t: 1 - 1 / t,
    ("js", 0.5): lambda t: (2 * t / (1 + t)).log(),
    ("alpha", 0.5): lambda t: (t**-0.5 - 1) / -0.5,
    ("alpha", 1.7): lambda t: (t**0.7 - 1) / 0.7,
}


@pytest.mark.parametrize("divergence, alpha", DERIVATIVES)
def test_log_ratios_enter_by_the_derivative(divergence, alpha):
    u, v = torch.tensor([0.5, -1.0, 2.0], dtype=F64), torch.tensor([-0.3, 0.7, 1.0], dtype=F64)
    bent = [DERIVATIVES[divergence, alpha](x.exp()).tolist() for x in (u, v)]
    found = f_dpo(pair_with(ratios=(u.tolist(), v.tolist())), divergence=divergence, alpha=alpha)
    torch.testing.assert_close(found, dpo(pair_with(ratios=(bent[0], bent[1]))))


def test_alpha_runs_from_forward_to_reverse_without_a_jump():
    pair = pair_of(random_rows(5, seed=0))
    for alpha, other in ((1.0, "reverse_kl"), (0.0, "forward_kl")):
        near, limit = f_dpo(pair, divergence="alpha", alpha=alpha + 1e-7), f_dpo(pair, divergence=other)
        torch.testing.assert_close(near, limit, rtol=1e-5, atol=1e-5)


def test_refuses_an_unknown_divergence():
    with pytest.raises(ValueError, match="give reverse_kl, forward_kl, js or alpha"):
        f_dpo(pair_with(ratios=([0.0], [0.0])), divergence="hellinger")  # type: ignore[arg-type]
