"""Command line of the conformance check."""

from garserve.conformance.run import main

if __name__ == "__main__":
    main()
