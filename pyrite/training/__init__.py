"""Training: the loop, batches of pairs, rounds, policy optimization, evaluation, metrics."""
