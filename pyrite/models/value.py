"""Value models: what is still to come of the reward before every token, in units of the reward.

`ValueModel` has a trunk of its own, begun from any model or from a reward model; `WithValue` is a policy with a head on
its trunk, so that one forward gives both. A value is read where the token is predicted: it has not seen the token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from pyrite.core.processes import once
from pyrite.data.responses import Responses
from pyrite.models import forward
from pyrite.models.forward import Groups, Packed, context_of, pad_of, places, states
from pyrite.models.loading import (
    Dtype,
    Lora,
    adapted,
    backbone,
    draw_head,
    is_classifier,
    opened,
    pad_id,
    save,
    settings,
)
from pyrite.models.policy import Policy, cost, pack_for

HEAD = "value_head.safetensors"


class ValueModel(nn.Module):
    """A sequence classifier with one output, read before every response token: (score − mean) / std."""

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: Any, *, mean: float = 0.0, std: float = 1.0
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.mean, self.std = mean, std
        self.ways = forward.ways(backbone(model))
        if not isinstance(getattr(backbone(model), "score", None), nn.Module) or not self.ways.causal:
            raise ValueError(f"{type(backbone(model)).__name__} reads ahead: a value model needs a decoder model")
        self.packed = self.ways.packed

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        lora: Lora | None = None,
        dtype: Dtype = "float32",
    ) -> ValueModel:
        """From a reward model, whose head and standardization it takes over; or from any other model, at 0 everywhere.

        lora: new adapters, which are trained beside the head in place of the trunk. Raises ValueError for a
        model that is no decoder, for new adapters beside old ones.
        """
        about = settings(path)
        starts = not about and not is_classifier(path)
        model, tokenizer = opened(AutoModelForSequenceClassification, path, dtype=dtype, new_head=starts)
        backbone(model).config.pad_token_id = pad_id(tokenizer)
        if starts:
            draw_head(model, seed=0, std=0.0)
        if lora is not None and isinstance(model, PeftModel):
            raise ValueError(f"{path} has adapters, which are trained on: leave out lora=, or merge them")
        made = cls(
            adapted(model, lora, task="SEQ_CLS"), tokenizer, mean=about.get("mean", 0.0), std=about.get("std", 1.0)
        )
        once(cost(made, path))
        return made

    @property
    def context(self) -> int:
        """Longest prompt + response in tokens."""
        return context_of(backbone(self.model))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def pack(self, responses: Responses, groups: Groups | None = None) -> Packed:
        """Groups of responses, by default those to each prompt, as this model reads them, on its device."""
        return pack_for(self, responses, groups)

    def forward(self, batch: Packed) -> Tensor:
        """The value before each of the R response tokens, (R,) float32."""
        model: Any = backbone(self.model)
        hidden = states(model, batch, self.ways, pad=pad_of(model))
        return (model.score(hidden.index_select(0, places(batch).predictor)).squeeze(-1).float() - self.mean) / self.std

    def values(self, batch: Packed) -> Tensor:
        return self(batch)

    def save(self, folder: str | Path) -> None:
        """Hugging Face layout; the standardization travels in the model's config."""
        config = backbone(self.model).config
        config.pyrite = {**(getattr(config, "pyrite", None) or {}), "mean": self.mean, "std": self.std}
        save(self.model, folder, self.tokenizer)
        config.save_pretrained(folder)


class WithValue(nn.Module):
    """A policy and a linear head on its trunk, 0 at first and float32 throughout.

    detach: the values' gradient stops at the head, so that the trunk is the policy's alone.
    """

    def __init__(self, policy: Policy, *, detach: bool = False) -> None:
        super().__init__()
        self.policy, self.detach = policy, detach
        size = backbone(policy.model).config.get_text_config().hidden_size
        self.head = nn.Linear(size, 1, device=policy.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """The policy's."""
        return self.policy.model

    def pack(self, responses: Responses, groups: Groups | None = None) -> Packed:
        """As the policy reads them, on its device."""
        return self.policy.pack(responses, groups)

    def forward(self, batch: Packed) -> Tensor:
        """(2, R) float32: log-probability of each of the R response tokens, nats, and the value before it."""
        hidden, logp = self.policy.read(batch)
        return torch.stack([logp, self._value(hidden)])

    def values(self, batch: Packed) -> Tensor:
        """The values alone, (R,)."""
        return self._value(self.policy.predicting(batch))

    def save(self, folder: str | Path) -> None:
        """The policy as it saves itself, and the head beside it."""
        self.policy.save(folder)
        save_file({name: value.contiguous() for name, value in self.head.state_dict().items()}, Path(folder) / HEAD)

    def _value(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head((hidden.detach() if self.detach else hidden).float()).squeeze(-1)
