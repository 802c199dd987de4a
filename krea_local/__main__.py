"""`python -m krea_local`: the command `krea-local`."""

import sys

from krea_local.cli import main

if __name__ == "__main__":
    sys.exit(main())
