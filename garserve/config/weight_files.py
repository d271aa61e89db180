"""Which safetensors file of a checkpoint's folder holds each tensor, by an index or by the files' own headers."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from garserve.config.files import read_json, unreadable
from garserve.errors import CheckpointError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def locate_tensors(folder: Path) -> dict[str, Path]:
    """Map each tensor's name to the file that holds it: those of the index, or those of `model.safetensors`.

    Raises CheckpointError where a file is missing, unreadable or broken, where the index does not tell the truth, or
    where other weights lie beside, which vLLM would load too, or instead.
    """
    index, single = folder / _INDEX, folder / _SINGLE
    if index.is_file():
        held = _indexed(folder, index)
        _refuse_others(folder, set(held.values()), "consolidated*.safetensors")  # to vLLM, a whole model of its own
        return held
    if single.is_file():
        _refuse_others(folder, {single}, "*.safetensors")
        return _names_in({single})
    pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    if pickles:
        raise CheckpointError(
            f"{folder}: only pickled weights found ({pickles[0]}); garserve opens safetensors alone, convert them first"
        )
    raise CheckpointError(f"checkpoint file missing: {single} (or {_INDEX})")


def _indexed(folder: Path, index: Path) -> dict[str, Path]:
    """Return what the index's files hold, after checking that each tensor is where the index puts it."""
    data = read_json(index)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: field weight_map: expected tensor names and file names")
    for name in weight_map.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: field weight_map: expected a safetensors file beside it, got {name!r}")
    held = _names_in({folder / name for name in weight_map.values()})
    for tensor, name in weight_map.items():
        if held.get(tensor) != folder / name:
            raise CheckpointError(f"{index}: tensor {tensor} is not in {name}, where the index puts it")
    return held


def _refuse_others(folder: Path, known: set[Path], pattern: str) -> None:
    """Refuse weights that nothing accounts for. vLLM's loader takes no hidden files, so those may stay."""
    others = sorted(path.name for path in set(folder.glob(pattern)) - known if not path.name.startswith("."))
    if others:
        raise CheckpointError(
            f"{folder / others[0]}: expected no weights beside {', '.join(sorted(path.name for path in known)):.200}; "
            f"vLLM would load them, too: move them out of the folder, or keep the model's files in one of its own"
        )


def _names_in(paths: set[Path]) -> dict[str, Path]:
    """Return which file holds each tensor. Each file is opened plainly first: safetensors says of one that may not be
    read that it is not there.
    """
    names: dict[str, Path] = {}
    for path in sorted(paths):
        if not path.is_file():
            raise CheckpointError(f"checkpoint file missing: {path}")
        try:
            path.open("rb").close()
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in names:
                        raise CheckpointError(f"{path}: tensor {name} is in {names[name].name} already")
                    names[name] = path
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a safetensors file ({error})") from None
        except OSError as error:
            raise unreadable(path, error) from None
    return names
