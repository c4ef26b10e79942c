"""`python -m ringzero.cli` is `ringzero`."""

from ringzero.cli import main

if __name__ == "__main__":
    main()
