"""Policies, reward models and value models: load, adapt, log-probabilities, scores, values, save.

All run packed rows through the stock transformers model where its architecture allows it and padded
where it does not (an encoder, recurrent layers, unusual masks); rows that may not share a batch are run apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pyrite.core.processes import once
from pyrite.data.responses import Prompt, Responses
from pyrite.data.text import PLAIN, Template, decode, encode, encode_prompts, remembering, stop_ids
from pyrite.math import seeds
from pyrite.math.logps import Logps
from pyrite.models import forward, generation
from pyrite.models.forward import (
    Groups,
    Packed,
    Ways,
    by_group,
    by_response,
    context_of,
    logp_details,
    longest,
    own_head,
    pack,
    pad_of,
    picked_logp,
    places,
    recompute_layers,
    run,
    score,
    selective_logp,
    states,
)
from pyrite.models.loading import (
    Dtype,
    Lora,
    active_adapter,
    adapted,
    backbone,
    beside,
    check_ids,
    draw_head,
    has_bare_head,
    is_classifier,
    member_paths,
    one_trunk,
    opened,
    pad_id,
    save,
    settings,
    tokenizer_of,
)

Pooling = Literal["last", "mean"]
HEAD = "value_head.safetensors"  # beside a policy that has one
REORDERED = frozenset({"xlnet", "xlm", "flaubert"})  # generate puts a mask behind the text, which a text has not


class Policy(nn.Module):
    """A causal language model that gives log-probabilities of response tokens."""

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model = model
        own = getattr(backbone(model).generation_config, "eos_token_id", None)
        self.tokenizer = remembering(tokenizer, ends=[own] if isinstance(own, int) else own or ())
        self.reversible = False  # without its adapters it is the model it was loaded from
        self.ways = forward.ways(backbone(model))
        _check_speaks(model, self.ways)
        self.bare = self.ways.bare and has_bare_head(model)
        self.packed = self.ways.packed and self.bare

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        lora: Lora | None = None,
        dtype: Dtype = "float32",
        template: Template = PLAIN,
    ) -> Policy:
        """From a folder or Hub name. A folder with adapters loads its base below them.

        template: arguments of its chat template.
        """
        model, tokenizer = opened(AutoModelForCausalLM, path, dtype=dtype, template=template)
        made = cls(adapted(model, lora, task="CAUSAL_LM"), tokenizer)
        made.reversible = isinstance(made.model, PeftModel) and not isinstance(model, PeftModel)
        once(cost(made, path))
        return made

    @property
    def context(self) -> int:
        """Longest prompt + response in tokens."""
        return context_of(backbone(self.model))

    @property
    def stops(self) -> list[int]:
        """Ids of the tokens that end a drawn answer."""
        return stop_ids(self.tokenizer)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def pack(self, responses: Responses, groups: Groups | None = None) -> Packed:
        """Pack groups of responses, by default those to each prompt, as this model reads them, on its device."""
        return pack_for(self, responses, groups)

    def forward(self, batch: Packed, *, details: bool = False, ref: Policy | None = None) -> Tensor:
        """Log-probability of each of the R response tokens, (R,) float32 nats.

        With `details`, (3, R): also the token's KL(ref || policy) (0 without `ref`) and log of the sum of squares.
        """
        if details:
            return logp_details(self.logits(batch), batch.target, ref.logits(batch) if ref else None)
        return self._picked(self.readable(batch), None)

    def read(self, batch: Packed) -> tuple[Tensor, Tensor]:
        """Hidden states (R, H) that predict the response tokens, and the log-probabilities (R,) of these."""
        hidden = self.predicting(batch)
        return hidden, self._picked(self.readable(batch), hidden)

    def logits(self, batch: Packed) -> Callable[[slice], Tensor]:
        """A function from rows to the logits that predict these of the R response tokens.

        Only those are ever computed, unless the model's head reads more than its trunk's states.
        """
        return self._head(self.readable(batch), None)

    def predicting(self, batch: Packed) -> Tensor:
        """Hidden states (R, H) that predict the response tokens of a batch."""
        batch, model = self.readable(batch), backbone(self.model)
        if model.base_model is model:  # no trunk to be found in it

            def last(ids: Tensor, mask: Tensor | None) -> Tensor:
                return run(model, ids, mask, output_hidden_states=True).hidden_states[-1]

            whole = by_group(model, batch, self.ways, last, pad=pad_of(model))
            return whole.flatten(0, 1).index_select(0, places(batch).predictor)
        return states(model, batch, self.ways, pad=pad_of(model)).index_select(0, places(batch).predictor)

    def readable(self, batch: Packed) -> Packed:
        """The batch as this model can read it, if another model laid it out."""
        return batch if batch.padded or fits(self, *batch.given) else self.pack(*batch.given)

    @property
    def head_weight(self) -> Tensor:
        """The weight of a bare vocabulary head."""
        return backbone(self.model).get_output_embeddings().weight  # type: ignore[union-attr,return-value]

    def logps(self, batch: Packed, *, tokens: bool = False) -> Logps:
        """Log-probabilities of the N responses; `tokens=True` keeps them token by token."""
        return by_response(self(batch), batch, tokens=tokens)

    def reading(self, precision: Dtype) -> torch.autocast:
        """The context in which this policy computes in a precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16")

    @contextmanager
    def without_adapters(self) -> Iterator[Policy]:
        """Its adapters, if it has any, are off within this block."""
        with self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext():
            yield self

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        k: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> Responses:
        """k responses to each prompt, a text or a conversation; they depend on the seed and the prompt's index alone.

        Tokens are drawn from softmax(logits / temperature), cut to top_k, then to top_p; temperature 0 is greedy.
        Raises ValueError for a prompt that leaves no room for max_new_tokens in the context.
        """
        _check_prompts(prompts)
        rows = [{"prompt_id": str(i), "prompt": prompt} for i, prompt in enumerate(prompts)]
        return self.draw(
            rows,
            encode_prompts(self.tokenizer, prompts),
            k=k,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            keys=range(len(rows)),
        )

    def draw(
        self,
        rows: Sequence[dict[str, Any]],
        ids: Sequence[list[int]],
        *,
        k: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        keys: Sequence[int] | None = None,
        exponents: Tensor | None = None,
        ref: Policy | None = None,
        max_rows: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Responses:
        """k responses to each prompt {prompt_id, prompt}, given as token ids too, with their log-probabilities.

        keys: the prompts' identities in the random streams, by default from their ids. exponents (P, k, 2): draw from
        policy^a ref^b, where `ref` None is the policy without its adapters. Other options: `generation.sample`.
        """
        drawing: dict[str, Any] = {
            "eos": self.stops,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "seed": seed,
            "keys": [seeds.derive(0, str(row["prompt_id"])) for row in rows] if keys is None else keys,
            "max_rows": max_rows,
            "progress": progress,
        }
        if exponents is None:
            drawn = generation.sample(backbone(self.model), ids, k=k, **drawing)
        else:
            other = None if ref is None else ref.model
            drawn = generation.sample_mixed(self.model, other, ids, exponents=exponents, **drawing)
        mask = torch.arange(drawn.tokens.shape[1], device=drawn.length.device) < drawn.length[:, None]
        return Responses(
            rows=rows,
            prompt_ids=ids,
            prompt=drawn.prompt.cpu(),
            texts=decode(self.tokenizer, drawn.responses()),
            ids=drawn.tokens[mask].cpu(),
            lengths=drawn.length.cpu(),
            finished=drawn.finished.cpu(),
            logps=drawn.policy_logps[mask].cpu(),
        )

    def frozen_copy(self) -> Policy:
        """The policy as it is now, for a reference: the weights it does not train are shared, the others copied.

        Of a policy that trains its top layers this is a second head on one trunk in memory; each computes the trunk
        for itself, since a drawn answer is read by the reference alone: the draws gave the policy's log-probabilities.
        """
        kept = {id(parameter): parameter for parameter in self.parameters() if not parameter.requires_grad}
        return copy.deepcopy(self, kept).requires_grad_(False)

    def save(self, folder: str | Path) -> None:
        """Hugging Face layout, safetensors, tokenizer included."""
        save(self.model, folder, self.tokenizer)

    def _picked(self, batch: Packed, hidden: Tensor | None) -> Tensor:
        """Log-probabilities (R,) of the response tokens. hidden: the states that predict them, if known."""
        if self.bare:
            hidden = self.predicting(batch) if hidden is None else hidden
            return selective_logp(hidden, self.head_weight, batch.target)
        size = backbone(self.model).config.get_text_config().vocab_size
        return picked_logp(self._head(batch, hidden), batch.target, size=size)

    def _head(self, batch: Packed, hidden: Tensor | None) -> Callable[[slice], Tensor]:
        """A function from rows to logits of these response tokens. hidden: the states that predict them, if known."""
        model = backbone(self.model)
        if not (self.bare or self.ways.head):
            pad = pad_of(model)
            whole = by_group(model, batch, self.ways, lambda ids, mask: run(model, ids, mask).logits, pad=pad)
            chosen = whole.flatten(0, 1).index_select(0, places(batch).predictor)
            return lambda rows: chosen[rows]
        known, head = self.predicting(batch) if hidden is None else hidden, own_head(model)
        if self.bare:
            return lambda rows: F.linear(known[rows], self.head_weight)
        if isinstance(self.model, PeftModel):  # its adapters may be off by the time that rows are asked for
            chosen = head(known)
            return lambda rows: chosen[rows]
        return lambda rows: head(known[rows])


class RewardModel(nn.Module):
    """A sequence classifier with one output, read at the last token (or the mean) of the response."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: Any,
        *,
        pooling: Pooling = "last",
        mean: float = 0.0,
        std: float = 1.0,
        max_length: int | None = None,
        max_prompt: int | None = None,
        adapter: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.adapter = adapter or active_adapter(model)
        self.pooling: Pooling = pooling
        self.mean, self.std = mean, std
        self.max_length = max_length or self.context
        self.max_prompt = max_prompt or self.max_length * 3 // 4
        self.ways = forward.ways(backbone(model))
        score = getattr(backbone(model), "score", None)  # the head transformers gives every decoder classifier
        self.decodes = isinstance(score, nn.Module) and self.ways.causal and self.ways.head
        self.packed = self.decodes and self.ways.packed
        if pooling == "mean" and not self.decodes:
            raise ValueError("pooling=mean needs a decoder model; use pooling=last")

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        lora: Lora | None = None,
        dtype: Dtype = "float32",
        pooling: Pooling | None = None,
        max_length: int | None = None,
        max_prompt: int | None = None,
        head_seed: int | None = None,
        head_std: float = 0.02,
        sibling: RewardModel | None = None,
        template: Template = PLAIN,
    ) -> RewardModel:
        """From a saved reward model, or from any base model with `head_seed`, which draws a new head.

        sibling: a loaded reward model; what both have in common, an equal trunk or the base below adapters, is kept
        in memory once, for scoring. template: what its chat template is told, over what it was saved with.
        """
        shared = beside(sibling.model, path) if sibling else None
        if shared:
            model, adapter = shared
            tokenizer = tokenizer_of(path, template_args=template.template_args)
            check_ids(tokenizer, model, path)
        else:
            with torch.random.fork_rng():  # an encoder's pooler, where the base has none, is drawn with the head
                torch.manual_seed(head_seed or 0)
                kind, adapter = AutoModelForSequenceClassification, None
                model, tokenizer = opened(kind, path, dtype=dtype, new_head=head_seed is not None, template=template)
        saved = settings(path)
        model.config.pad_token_id = pad_id(tokenizer)
        if head_seed is not None:
            draw_head(model, seed=head_seed, std=head_std)
        made = cls(
            adapted(model, lora, task="SEQ_CLS"),
            sibling.tokenizer if sibling and shared else tokenizer,
            pooling=pooling or saved.get("pooling", "last"),
            mean=saved.get("mean", 0.0),
            std=saved.get("std", 1.0),
            max_length=max_length or saved.get("max_length"),
            max_prompt=max_prompt or saved.get("max_prompt"),
            adapter=adapter,
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
        """Pack groups of responses, by default those to each prompt, as this model reads them, on its device."""
        return pack_for(self, responses, groups)

    def forward(self, batch: Packed) -> Tensor:
        """Raw scores of the N responses, (N,) float32."""
        if self.decodes:
            return self.read(self.pooled(batch, self.pooling))
        return self._plain(batch)

    def encode(
        self, said: Responses, *, where: Callable[[int], str] | None = None, as_drawn: bool = False
    ) -> Responses:
        """Responses as this model reads them, in training as in scoring. A cut answer gets no end token."""
        limits = {"max_length": self.max_length, "max_prompt": self.max_prompt}
        return encode(self.tokenizer, said, where=where, as_drawn=as_drawn, **limits)

    def scores(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, finished: bool | Sequence[bool] = True
    ) -> Tensor:
        """Standardized scores (N,): (raw - mean) / std with the constants measured after training."""
        return RewardEnsemble([self]).scores(prompts, responses, finished=finished)[0]

    def raw_scores(
        self, encoded: Responses, *, budget: int = 16384, progress: Callable[[int], None] | None = None
    ) -> Tensor:
        """Raw scores (N,) of responses in this model's tokens. A score does not depend on the rest of the batch."""
        return score(self, encoded, each="response", budget=budget, progress=progress)

    def pooled(self, batch: Packed, pooling: Pooling) -> Tensor:
        """What the head reads of each of the N responses of a packed batch, (N, H)."""
        hidden, at = states(self._active(), batch, self.ways, pad=pad_of(self._active())), places(batch)
        if pooling == "last":
            return hidden.index_select(0, at.last)
        total = hidden.new_zeros(batch.n, hidden.shape[1]).index_add(0, batch.owner, hidden[at.response])
        return total / batch.lengths.clamp(min=1)[:, None]

    def read(self, pooled: Tensor) -> Tensor:
        """The head's scores (N,) float32 of pooled states (N, H)."""
        return self._active().score(pooled).squeeze(-1).float()

    def save(self, folder: str | Path) -> None:
        """Hugging Face layout. Pooling and standardization are saved in the model's config."""
        if self.adapter and (others := len(self.model.peft_config) - 1):  # type: ignore[arg-type]
            raise ValueError(f"this reward model shares its base with {others} others; load it alone to save it")
        config = backbone(self.model).config
        names = ("pooling", "mean", "std", "max_length", "max_prompt")
        config.pyrite = {name: getattr(self, name) for name in names}
        save(self.model, folder, self.tokenizer)
        config.save_pretrained(folder)  # adapters alone would leave the constants behind

    def _plain(self, batch: Packed) -> Tensor:
        model = self._active()
        outputs = by_group(model, batch, self.ways, lambda ids, mask: run(model, ids, mask).logits, pad=pad_of(model))
        return outputs[:, 0].float()

    def _active(self) -> Any:
        """The transformers model, with this reward model's adapters active if several share it."""
        if self.adapter and self.model.active_adapter != self.adapter:
            self.model.set_adapter(self.adapter, inference_mode=True)  # type: ignore[operator,arg-type]
        return backbone(self.model)


class ValueModel(RewardModel):
    """A reward model read before every response token: (score − mean) / std, what is still to come of the reward."""

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: Any, *, mean: float = 0.0, std: float = 1.0, **reads: Any
    ) -> None:
        super().__init__(model, tokenizer, mean=mean, std=std, **reads)
        name = type(backbone(model)).__name__
        if not self.ways.causal:
            raise ValueError(f"{name} reads ahead: a value model needs a decoder model")
        if not self.decodes:
            raise ValueError(f"{name} has no head that reads one token's state alone, as a value model needs")

    @classmethod
    def load(cls, path: str | Path, *, lora: Lora | None = None, dtype: Dtype = "float32") -> ValueModel:  # pyright: ignore[reportIncompatibleMethodOverride]
        """From a reward model, whose head and standardization it takes over; or from any other model, at 0 everywhere.

        lora: new adapters, which are trained beside the head in place of the trunk. Raises ValueError for a model
        that is no decoder, and for new adapters beside old ones. How the reward model reads texts is kept, to be saved.
        """
        starts = not settings(path) and not is_classifier(path)
        scorer = RewardModel.load(path, dtype=dtype, head_seed=0 if starts else None, head_std=0.0)
        if lora is not None and isinstance(scorer.model, PeftModel):
            raise ValueError(f"{path} has adapters, which are trained on: leave out lora=, or merge them")
        kept = {name: getattr(scorer, name) for name in ("mean", "std", "pooling", "max_length", "max_prompt")}
        return cls(adapted(scorer.model, lora, task="SEQ_CLS"), scorer.tokenizer, **kept)

    def forward(self, batch: Packed) -> Tensor:
        """The value before each of the R response tokens, (R,) float32: it has not seen the token."""
        hidden = states(self._active(), batch, self.ways, pad=pad_of(self._active()))
        return (self.read(hidden.index_select(0, places(batch).predictor)) - self.mean) / self.std

    def values(self, batch: Packed) -> Tensor:
        return self(batch)


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
        """The policy's model."""
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
        """Save the policy, and the head beside it."""
        self.policy.save(folder)
        save_file({name: value.contiguous() for name, value in self.head.state_dict().items()}, Path(folder) / HEAD)

    def _value(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head((hidden.detach() if self.detach else hidden).float()).squeeze(-1)


def recompute(model: Policy | RewardModel) -> None:
    """From now on, compute layers again for their gradients: less memory, more time."""
    recompute_layers(backbone(model.model))


class RewardEnsemble:
    """E reward models over the same texts. What they share is in memory once, and a shared trunk runs once."""

    def __init__(self, members: Sequence[RewardModel]) -> None:
        self.members = list(members)

    @classmethod
    def load(
        cls, folder: str | Path, *, dtype: Dtype = "float32", loaded: dict[Path, RewardEnsemble] | None = None
    ) -> RewardEnsemble:
        """All `member_*` of a reward run, or one reward model folder as an ensemble of one.

        loaded: ensembles that a job has loaded so far, by folder, to look up and add to: a run that is both reward and
        proxy is in memory once.
        """
        if loaded is not None:
            place = Path(folder).resolve()
            return loaded[place] if place in loaded else loaded.setdefault(place, cls.load(folder, dtype=dtype))
        first, *others = member_paths(folder)
        lead = RewardModel.load(first, dtype=dtype)
        return cls([lead, *(RewardModel.load(path, dtype=dtype, sibling=lead) for path in others)])

    def scores(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, finished: bool | Sequence[bool] = True
    ) -> Tensor:
        """Standardized scores (E, N) of texts."""
        return self.standardized(
            Responses.said([{"prompt": prompt} for prompt in prompts], responses, finished=finished)
        )

    def score(self, said: Responses) -> Tensor:
        """The members' mean standardized score, a row for each prompt and a column for each of its K answers, (P, K).

        Raises ValueError if prompts have unequal numbers of answers.
        """
        return said.table(self.standardized(said).mean(0))

    def standardized(self, said: Responses) -> Tensor:
        """Standardized scores (E, N)."""
        raw = self.raw(said)
        return torch.stack([(row - member.mean) / member.std for member, row in zip(self.members, raw, strict=True)])

    def raw(self, said: Responses) -> Tensor:
        """Raw scores (E, N): differences are log-odds, nats. Members of one tokenizer and limits read together."""
        if not len(said):
            return torch.empty(len(self.members), 0)
        reads = {(id(m.tokenizer), m.pooling, m.max_length, m.max_prompt, m.packed) for m in self.members}
        groups = [self] if len(reads) == 1 else [RewardEnsemble([member]) for member in self.members]
        return torch.cat(
            [score(group, group.members[0].encode(said, as_drawn=True), each="response") for group in groups]
        )

    def save(self, folder: str | Path) -> None:
        """Save every member in a folder of its own, as `load` reads them."""
        for i, member in enumerate(self.members):
            member.save(Path(folder) / f"member_{i}")
        (Path(folder) / "done.json").write_text("{}\n")

    def pack(self, responses: Responses, groups: Groups | None = None) -> Packed:
        """As the first member packs."""
        return self.members[0].pack(responses, groups)

    def eval(self) -> None:
        """Every member in evaluation mode."""
        for member in self.members:
            member.eval()

    def __call__(self, batch: Packed) -> Tensor:
        """Raw scores (E, N) of a batch, by members that read alike."""
        if batch.padded or not one_trunk([member.model for member in self.members]):
            return torch.stack([member(batch) for member in self.members])
        pooled = self.members[0].pooled(batch, self.members[0].pooling)
        return torch.stack([member.read(pooled) for member in self.members])


def pack_for(model: Any, responses: Responses, groups: Groups | None = None) -> Packed:
    """Pack, or pad if the model cannot read packed rows: beyond a sliding window it needs its own masks."""
    groups = responses.groups() if groups is None else groups
    return pack(responses, groups, padded=not fits(model, responses, groups)).to(model.device)


def fits(model: Any, responses: Responses, groups: Groups) -> bool:
    """Whether a model can read these groups packed."""
    return model.packed and longest(responses, groups) <= model.ways.longest


def cost(model: Any, path: str | Path) -> str:
    """What running padded costs a model that reads no packed rows. Empty for one that does."""
    if model.packed:
        return ""
    inside = backbone(model.model)
    why = f"  note: {path}: {type(inside).__name__} runs padded: it reads a prompt again for each of its answers, "
    if not model.ways.padded:
        return why + "and only texts of one length together"
    if inside.get_output_embeddings() is not None and not model.ways.head:
        return why + "and computes pads, and the logits of prompts too"
    return why + "and computes pads too"


def _check_prompts(prompts: Any) -> None:
    """Raises ValueError for anything but a list of texts and conversations."""
    if isinstance(prompts, str):
        raise ValueError("prompts is one text: give a list of prompts")
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts is a {type(prompts).__name__}: give a list of texts or of conversations")
    for i, prompt in enumerate(prompts):
        turns = prompt if isinstance(prompt, list) else ()
        if not isinstance(prompt, (str, list)) or not all(isinstance(turn, dict) for turn in turns):
            hint = "; of a row, give row['prompt']" if isinstance(prompt, dict) else ""
            raise ValueError(f"prompt {i} is {prompt!r:.40}: give a text, or a list of messages{hint}")


def _check_speaks(model: Any, found: Ways) -> None:
    """Raises ValueError for a model whose log-probabilities of a text are not those it would draw it with."""
    inside = backbone(model)
    kind = type(inside).__name__
    if getattr(type(inside.config), "is_encoder_decoder", False):
        raise ValueError(f"{kind} is half of an encoder-decoder: a policy needs a decoder model, such as a Llama")
    if not found.causal or inside.config.model_type in REORDERED:
        raise ValueError(
            f"{kind} reads tokens beyond the one it predicts: a policy needs a causal language model "
            "(for an encoder that was trained as one, is_decoder: true in its config.json)"
        )
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(f"{kind} with prompt tuning: a policy takes adapters inside the model, such as LoRA")
