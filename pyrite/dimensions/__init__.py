"""Preference dimensions: options as data with ids, one renderer for all that read prompts, and variants of prompts."""

from pyrite.dimensions.options import Dimensions, Option, filled
from pyrite.dimensions.variants import Turn, Variants, conditioned, render

__all__ = ["Dimensions", "Option", "Turn", "Variants", "conditioned", "filled", "render"]
