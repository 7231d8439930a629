"""Opinions about text: scorers, judges, the ledger of what was paid for, pairs and which of them to label."""
