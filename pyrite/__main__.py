"""`python -m pyrite`, and what `accelerate launch -m pyrite` runs."""

from pyrite.cli import main

if __name__ == "__main__":
    main()
