"""`python -m glassflows`."""

from .commands.main import main

main()
