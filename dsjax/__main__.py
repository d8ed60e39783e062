"""`python -m dsjax`: the same as the `dsjax` command."""

from dsjax.cli import main

if __name__ == "__main__":
    main()
