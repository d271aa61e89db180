"""What training leaves in its folder: a whole checkpoint, and beside it what it needs to go on."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from network import TrainedGAR
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from garserve.checkpoint import HEAD, expected_tensors, module_name

STATE = "state.saved"  # of another suffix than weights: the folder is a checkpoint
Settings = dict[str, float]  # what must be the same for training to go on, by the names of options


def save(
    output: Path, model: TrainedGAR, optimizers: Sequence[torch.optim.Optimizer], done: int, settings: Settings
) -> None:
    """Write the checkpoint and the state after `done` steps."""
    weights = dict(model.state_dict())
    tensors = {name: weights[module_name(name)].contiguous() for name in expected_tensors(model.config)}
    if model.config.tied_head:
        tensors.pop(HEAD, None)
    _write_whole(tensors, output / "model.safetensors", {"format": "pt"})
    state = {f"model.{name}": tensor.contiguous().clone() for name, tensor in weights.items()}
    for name, weight, optimizer in _stepped(model, optimizers):
        values = optimizer.state.get(weight, {})
        state |= {f"{key}.{name}": torch.as_tensor(value).clone() for key, value in values.items()}
    _write_whole(state, output / STATE, {"done": str(done), "settings": json.dumps(settings)})


def resume(output: Path, model: TrainedGAR, optimizers: Sequence[torch.optim.Optimizer], settings: Settings) -> int:
    """Load what `save` left, if anything, and return how many steps were done.

    Raises SystemExit where training was begun with other settings.
    """
    path = output / STATE
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        known, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    begun = json.loads(known.get("settings", "{}"))
    if begun != settings:
        raise SystemExit(f"{output}: expected the settings that it was begun with, {begun}, got {settings}")
    model.load_state_dict({name[6:]: tensor for name, tensor in state.items() if name.startswith("model.")})
    kept: dict[str, dict[str, torch.Tensor]] = {}
    for place, tensor in state.items():
        key, name = place.split(".", 1)
        if key != "model":
            kept.setdefault(name, {})[key] = tensor
    for name, weight, optimizer in _stepped(model, optimizers):
        if name in kept:
            optimizer.state[weight] = kept[name]
    return int(known["done"])


def _stepped(
    model: TrainedGAR, optimizers: Sequence[torch.optim.Optimizer]
) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
    """Yield every weight by its name, with the optimizer that steps it."""
    names = {weight: name for name, weight in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                yield names[weight], weight, optimizer


def _write_whole(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a file that is there whole or not at all."""
    partial = path.with_name(path.name + ".part")
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)
