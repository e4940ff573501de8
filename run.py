"""`python run.py COMMAND ...`: raybert's command line from a checkout."""

import sys

from raybert.cli import main

if __name__ == "__main__":
    sys.exit(main())
