"""`python -m garserve` is the command `garserve`."""

from garserve.cli import main

main()
