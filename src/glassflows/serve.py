"""`python -m glassflows.serve REWARD` is `glassflows serve REWARD`."""

import sys

from .commands.main import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
