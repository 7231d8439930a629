"""Pyrite: preference optimization of language models against a reward you cannot fully trust.

These names are the public API; each is loaded when it is first used, so `import pyrite` is quick. Everything else in
the package may move.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyrite.core.runs import Run as Run
    from pyrite.data.responses import Responses as Responses
    from pyrite.data.rows import load as load
    from pyrite.feedback import judges as judges
    from pyrite.feedback import scorers as scorers
    from pyrite.feedback.scorers import scorer as scorer
    from pyrite.math import ensembles as ensembles
    from pyrite.math import losses as losses
    from pyrite.math import reward_losses as reward_losses
    from pyrite.math import samplers as samplers
    from pyrite.math.logps import Logps as Logps
    from pyrite.math.logps import PairLogps as PairLogps
    from pyrite.math.statistics import best_of_n as best_of_n
    from pyrite.math.statistics import best_of_n_kl as best_of_n_kl
    from pyrite.models.policy import Policy as Policy
    from pyrite.models.policy import RewardEnsemble as RewardEnsemble
    from pyrite.models.policy import RewardModel as RewardModel
    from pyrite.recipes import toy as toy
    from pyrite.training.pairs import Preferences as Preferences
    from pyrite.training.pairs import pair_logps as pair_logps
    from pyrite.training.pairs import preferences as preferences

    sft: Any
    generate: Any
    label: Any
    reward: Any
    dpo: Any
    online: Any
    ppo: Any
    evaluate: Any

__version__ = "0.1.0"

_PLACES = {
    "pyrite.core.runs": ("Run",),
    "pyrite.data.responses": ("Responses",),
    "pyrite.data.rows": ("load",),
    "pyrite.feedback": ("judges", "scorers"),
    "pyrite.feedback.scorers": ("scorer",),
    "pyrite.math": ("ensembles", "losses", "reward_losses", "samplers"),
    "pyrite.math.logps": ("Logps", "PairLogps"),
    "pyrite.math.statistics": ("best_of_n", "best_of_n_kl"),
    "pyrite.models.policy": ("Policy", "RewardEnsemble", "RewardModel"),
    "pyrite.recipes": ("toy",),
    "pyrite.training.pairs": ("Preferences", "pair_logps", "preferences"),
}
_JOBS = ("dpo", "evaluate", "generate", "label", "online", "ppo", "reward", "sft")
_PLACE = {name: module for module, names in _PLACES.items() for name in names}

__all__ = ["__version__", *sorted(_PLACE), *_JOBS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """A public name, loaded when it is first used."""
    if name in _JOBS:
        found: Any = importlib.import_module("pyrite.jobs").function(name)
    elif name in _PLACE:
        module = importlib.import_module(_PLACE[name])
        found = getattr(module, name, None) or importlib.import_module(f"{_PLACE[name]}.{name}")
    else:
        near = difflib.get_close_matches(name, __all__, n=1)
        raise AttributeError(
            f"module 'pyrite' has no attribute {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__]
