"""One file, one job: a config and `run(config) -> Run`, read top to bottom like the paper's algorithm."""
