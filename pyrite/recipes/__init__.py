"""Whole experiments: settings, run, report, claims. One module each, beside the worlds and the engine they share."""

NAMES = ("live_reward", "overoptimization", "references", "samplers", "soups")
