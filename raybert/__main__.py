"""`python -m raybert COMMAND ...`: the command line."""

import sys

from raybert.cli import main

if __name__ == "__main__":
    sys.exit(main())
