"""What `generate.py` is made of: draws, caches, engines and the loop over them."""
