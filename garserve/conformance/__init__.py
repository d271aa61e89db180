"""Holds garserve against golden vectors recorded from the authors' code: `python -m garserve.conformance FOLDER`."""
