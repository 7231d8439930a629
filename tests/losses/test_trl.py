"""The same numbers as TRL 1.16, from its own code: `DPOTrainer._compute_loss`, the CPO and the ORPO trainer."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from pyrite.core import specs as parts
from pyrite.math import losses
from pyrite.math.logps import Logps, PairLogps

from .fixtures import F64, pair_of, random_rows

pytest.importorskip("trl")
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

PROMPT = 3  # tokens before every response
Sides = list[list[Tensor]]

# ours, TRL's loss_type, its other settings
DIRECT: list[tuple[str, str, dict[str, Any]]] = [
    ("dpo()", "sigmoid", {}),
    ("dpo(beta=0.7)", "sigmoid", {"beta": 0.7}),
    ("robust(label_smoothing=0.1)", "robust", {"label_smoothing": 0.1}),
    ("ipo(tau=0.1,length_norm=True)", "ipo", {}),
    ("hinge()", "hinge", {}),
    ("exo(label_smoothing=1e-3)", "exo_pair", {"label_smoothing": 1e-3}),
    ("nca()", "nca_pair", {}),
    ("bco(delta=0.0)", "bco_pair", {}),
    ("sppo()", "sppo_hard", {}),
    ("apo_zero()", "apo_zero", {}),
    ("apo_down()", "apo_down", {}),
    ("discopop(tau=0.05)", "discopop", {}),
    ("aot()", "aot", {}),
    ("aot(label_smoothing=0.2)", "aot", {"label_smoothing": 0.2}),
    ("aot(paired=False)", "aot_unpaired", {}),
    ("ln_dpo(beta=5.0)", "sigmoid_norm", {"beta": 5.0}),
    ("ld_dpo(alpha=0.5)", "sigmoid", {"ld_alpha": 0.5}),
    ("f_dpo(divergence='forward_kl')", "sigmoid", {"f_divergence_type": "forward_kl"}),
    ("f_dpo(divergence='js')", "sigmoid", {"f_divergence_type": "js_divergence"}),
    ("f_dpo(divergence='alpha',alpha=0.3)", "sigmoid", {"f_divergence_type": "alpha_divergence"}),
    ("wpo()", "sigmoid", {"use_weighting": True}),
]
MIXED = [  # their likelihood is a mean over the batch's tokens, ours over each response's: equal for one pair
    ("dpo_nll(alpha=0.6)", ["sigmoid", "sft"], [1.0, 0.6]),
    ("mpo()", ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
]
LENGTH_FREE = [  # ours, the settings of TRL's CPO
    ("posterior()", {"loss_type": "sigmoid"}),
    ("cpo(alpha=1.0)", {"loss_type": "sigmoid", "cpo_alpha": 1.0}),
    ("simpo(beta=2.0,gamma=1.0)", {"loss_type": "simpo", "beta": 2.0}),
    ("alphapo(beta=2.0,gamma=1.0,alpha=0.25)", {"loss_type": "simpo", "beta": 2.0, "alpha": 0.25}),
]
HERE = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


class Given(torch.nn.Module):
    """A model whose log-probabilities of the responses' tokens are given, as TRL's models return them."""

    is_gradient_checkpointing = False

    def __init__(self, rows: list[Tensor], collision: Tensor) -> None:
        super().__init__()
        self.rows, self.collision = rows, collision

    def forward(self, *, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        width = input_ids.shape[1] - 1
        even = [(c / len(row)).expand(len(row)) for row, c in zip(self.rows, self.collision, strict=True)]
        logp, squares = (torch.stack([placed(row, width) for row in rows]) for rows in (self.rows, even))
        zero = torch.zeros_like(logp)
        names = {"log_probs": logp, "log_sum_sq_probs": squares, "entropy": zero, "mean_logits": zero}
        return SimpleNamespace(**names, is_top1=zero.bool())


def placed(row: Tensor, width: int) -> Tensor:
    """A response's values where they predict its tokens."""
    return pad(row, (PROMPT - 1, width - (PROMPT - 1) - len(row)))


def theirs(sides: Sides, pair: PairLogps, settings: dict[str, Any]) -> Tensor:
    """TRL's mean loss of a batch: the method itself, on an object that holds what it reads of a trainer."""
    rows, refs = sides[0] + sides[1], sides[2] + sides[3]
    assert pair.chosen.collision is not None and pair.rejected.collision is not None
    width = PROMPT + max(map(len, rows))
    at = torch.arange(width)
    mask = torch.stack([(at >= PROMPT) & (at < PROMPT + len(row)) for row in rows]).long()
    model = Given(rows, torch.cat([pair.chosen.collision, pair.rejected.collision])).train()
    trainer = SimpleNamespace(
        **{"model": model, "ref_model": Given(refs, torch.zeros(len(refs))), "accelerator": HERE},
        **{"args": SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05)},
        **{"aux_loss_enabled": False, "precompute_ref_logps": False},
        **{"_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1},
        **{"beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None, "use_weighting": False, "loss_weights": [1.0]},
        **{"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.3},
    )
    vars(trainer).update(settings)
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    return DPOTrainer._compute_loss(trainer, model, inputs, False)


def agree(ours: Tensor, trl: Tensor, leaves: list[Tensor]) -> None:
    assert ours.item() == pytest.approx(trl.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(trl, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def rows_for(spec: str, pairs: int, seed: int) -> Sides:
    dtype = torch.float32 if "divergence='alpha'" in spec else F64  # theirs raises KeyError in float64
    return [[row.to(dtype).requires_grad_() for row in rows] for rows in random_rows(pairs, seed, 2.0)]


@pytest.mark.parametrize(("spec", "loss_type", "settings"), DIRECT, ids=[spec for spec, _, _ in DIRECT])
@pytest.mark.parametrize("seed", [0, 1])
def test_direct_losses(spec: str, loss_type: str, settings: dict[str, Any], seed: int) -> None:
    sides = rows_for(spec, 4, seed)
    pair = pair_of(sides)
    trl = theirs(sides, pair, {"loss_types": [loss_type], **settings})
    agree(parts.part(spec, losses)(pair).mean(), trl, sides[0] + sides[1])


@pytest.mark.parametrize(("spec", "loss_types", "weights"), MIXED, ids=[spec for spec, _, _ in MIXED])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_losses_with_imitation(spec: str, loss_types: list[str], weights: list[float], seed: int) -> None:
    sides = rows_for(spec, 1, seed)
    pair = pair_of(sides)
    trl = theirs(sides, pair, {"loss_types": loss_types, "loss_weights": weights})
    agree(parts.part(spec, losses)(pair).mean(), trl, sides[0] + sides[1])


def with_logits(chosen: Tensor, rejected: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """A model and a batch of one pair after one token: token 0 of 2 has the given log-probabilities."""
    width = 1 + max(len(chosen), len(rejected))
    rows = [pad(row, (0, width - len(row)), value=-1.0) for row in (chosen, rejected)]
    logits = torch.stack([torch.stack([row, torch.log1p(-row.exp())], -1) for row in rows])
    batch = {}
    for name, row in (("chosen", chosen), ("rejected", rejected)):
        ids = torch.zeros(1, 1 + len(row), dtype=torch.long)
        batch |= {f"{name}_input_ids": ids, f"{name}_attention_mask": torch.ones_like(ids)}
        batch[f"{name}_labels"] = torch.cat([torch.full((1, 1), -100), ids[:, 1:]], 1)
    return lambda *_, **__: SimpleNamespace(logits=logits), batch


def without_reference(kind: Any, loss: str, sides: Sides, settings: dict[str, Any]) -> Tensor:
    """TRL's CPO or ORPO loss of one pair."""
    names = {"is_encoder_decoder": False, "pad_token_id": 0, "padding_value": 0, "aux_loss_enabled": False}
    trainer = SimpleNamespace(**names, accelerator=HERE, beta=0.1, label_smoothing=0.0, alpha=0.0, cpo_alpha=0.0)
    vars(trainer).update(simpo_gamma=1.0, **settings)
    trainer.concatenated_inputs, trainer.get_batch_logps = kind.concatenated_inputs, kind.get_batch_logps
    for name in ("concatenated_forward", loss):
        setattr(trainer, name, partial(getattr(kind, name), trainer))
    return kind.get_batch_loss_metrics(trainer, *with_logits(sides[0][0], sides[1][0]))[0]


def policy_only(sides: Sides) -> PairLogps:
    return PairLogps(Logps.from_tokens(sides[0]), Logps.from_tokens(sides[1]))


@pytest.mark.parametrize(("spec", "settings"), LENGTH_FREE, ids=[spec for spec, _ in LENGTH_FREE])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_contrastive_losses(spec: str, settings: dict[str, Any], seed: int) -> None:
    sides = rows_for(spec, 1, seed)
    trl = without_reference(CPOTrainer, "cpo_loss", sides, settings)
    agree(parts.part(spec, losses)(policy_only(sides)).mean(), trl, sides[0] + sides[1])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_odds_ratio_loss(seed: int) -> None:
    """Their likelihood takes the prompt in, but predicts nothing of a prompt of one token; odds are in float32."""
    sides = rows_for("orpo", 1, seed)
    trl = without_reference(ORPOTrainer, "odds_ratio_loss", sides, {"beta": 0.4})
    agree(losses.orpo(policy_only(sides), lam=0.4).mean(), trl, sides[0] + sides[1])


@pytest.mark.parametrize(("spec", "loss_type", "settings"), DIRECT, ids=[spec for spec, _, _ in DIRECT])
def test_the_comparison_has_teeth(spec: str, loss_type: str, settings: dict[str, Any]) -> None:
    sides = rows_for(spec, 4, 0)
    other = [sides[0], [row - 0.1 for row in sides[1]], *sides[2:]]
    trl = theirs(sides, pair_of(sides), {"loss_types": [loss_type], **settings})
    assert parts.part(spec, losses)(pair_of(other)).mean().item() != pytest.approx(trl.item(), rel=1e-3)
