"""Runs the command line: `python -m fila` is `fila`."""

import sys

from fila.cli import main

if __name__ == "__main__":
    sys.exit(main())
