"""Whole experiments: settings, run, report, claims."""
