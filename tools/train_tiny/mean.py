"""Average two checkpoints of one training: `python tools/train_tiny/mean.py FIRST SECOND -o FOLDER --share 0.75`.

Weights between those of a run's start and its end often tell more than either (Wortsman et al., "Robust fine-tuning of
zero-shot models", 2022).
"""

import shutil
from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import load_file, save_file

FILE = "model.safetensors"


def main(
    first: Annotated[Path, typer.Argument(help="A checkpoint, whose other files are copied.")],
    second: Annotated[Path, typer.Argument(help="What it became.")],
    output: Annotated[Path, typer.Option("-o", help="Folder to write.")],
    share: Annotated[float, typer.Option(min=0, max=1, help="Of the second.")] = 0.5,
) -> None:
    """Write the mean of two checkpoints' weights."""
    weights, others = load_file(first / FILE), load_file(second / FILE)
    shapes = [{name: tensor.shape for name, tensor in some.items()} for some in (weights, others)]
    if shapes[0] != shapes[1]:
        raise SystemExit(f"{second}: expected weights of the names and shapes of {first}")
    output.mkdir(parents=True, exist_ok=True)
    for path in first.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, output / path.name)
    mean = {
        name: ((1 - share) * tensor.float() + share * others[name].float()).to(tensor.dtype).contiguous()
        for name, tensor in weights.items()
    }
    save_file(mean, output / FILE, metadata={"format": "pt"})


if __name__ == "__main__":
    typer.run(main)
