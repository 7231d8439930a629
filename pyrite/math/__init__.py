"""Mathematics: pure functions of tensors. It never sees a model, a tokenizer or a path."""
