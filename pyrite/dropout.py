"""The dropout a model learns with.

A preference loss compares the policy with its reference, and policy optimization compares it with the policy that
drew. Both are read without dropout, so the learner is too, unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from pyrite.progress import say

__all__ = ["largest", "learn_with"]


def learn_with(model: nn.Module, dropout: float | None, *, name: str | None) -> None:
    """Give every dropout of a model this probability; None leaves the model's own. A note says what that changes.

    Adapters have a dropout of their own (--lora-dropout), which stays. name: of the model, for the note; None for none.
    """
    own = largest(model)
    if dropout is None:
        if own and name:
            say(f"  note: {name} learns with its own dropout, {own:g}; --dropout 0 turns it off")
        return
    for module, attribute in _places(model):
        setattr(module, attribute, dropout)
    if name and own not in (0, dropout):
        say(f"  note: {name} has a dropout of {own:g}; here it learns with {dropout:g} (--dropout {own:g} keeps it)")


def largest(model: nn.Module) -> float:
    """The largest probability of dropout in a model, 0 if it has none."""
    return max((getattr(module, attribute) for module, attribute in _places(model)), default=0.0)


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules and the names of their attributes that hold a probability of dropout."""
    for path, module in model.named_modules():
        if "lora_" in path:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            yield module, "p"
        else:
            held = [name for name, value in vars(module).items() if "drop" in name and type(value) is float]
            yield from ((module, name) for name in held)
