"""Models: loading, packed forward passes, log-probabilities, scores, sampling, references."""
