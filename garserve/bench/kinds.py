"""The kinds of workload, by name: read by the command line, which imports nothing heavy."""

from typing import Literal

Kind = Literal["dense", "five", "questions", "stream"]
KINDS: dict[Kind, str] = {
    "dense": "20 regions of each image, each described",
    "five": "one question about five regions of each image",
    "questions": "ten questions about the same five regions of each image",
    "stream": "one region of each image",
}
HELP = "; ".join(f"{kind}: {text}" for kind, text in KINDS.items()) + "."
