"""What the texts of a job depend on, kept beside its output so that different jobs do not mix in one file."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from garserve import __version__
from garserve.batch.filters import Filters
from garserve.batch.journal import OutputError
from garserve.batch.prepare import Preparation
from garserve.errors import RequestError
from garserve.model.onnx_file import read_info

_FILES = ("config.json", "preprocessor_config.json", "tokenizer.json")


def checkpoint_digest(folder: Path) -> str:
    """Return a hash over everything of a checkpoint that answers depend on, weights included."""
    whole = blake3()
    for path in sorted([*(folder / name for name in _FILES), *folder.glob("*.safetensors")]):
        content = blake3(max_threads=blake3.AUTO)
        if path.is_file() and path.stat().st_size:
            content.update_mmap(path)
        whole.update(path.name.encode() + b"\0" + content.digest())
    return whole.hexdigest(16)


def vision_identity(backend: str | None, model: Path | None) -> str | None:
    """Return what a job notes of the tower that it was told to compute tiles with; None where it was told nothing.

    That is the backend, with `ModelInfo.tower` of a `model`: not where the model lies, but what it was made as. An
    export in float32 adds nothing to its backend, and neither does the one that garserve makes of itself.
    Raises OnnxError where the model is missing or broken.
    """
    if model is None:
        return backend
    return f"{backend or 'onnx'} {read_info(model).tower}".rstrip()


def describe_job(
    preparation: Preparation, filters: Filters, *, each_region: bool, vision: str | None = None
) -> dict[str, Any]:
    """Return what texts depend on; filters count where they decide which regions share a prompt.

    `vision` is a `vision_identity`.
    """
    folder = Path(preparation.folder)
    processor = preparation.processor()
    job: dict[str, Any] = {
        "checkpoint": checkpoint_digest(folder),
        "max_num_tiles": processor.max_num_tiles,
        "box_scale": processor.config.replay_box_scale,
        "group": preparation.group,
        "question": preparation.question,
        "system": preparation.system,
        "max_tokens": preparation.max_tokens,
        "temperature": preparation.temperature,
        "each_region": each_region,
        "vision": vision,
    }
    if preparation.group > 1:
        job["group_gap"] = preparation.group_gap
        chosen = asdict(filters)
        job["filters"] = {key: sorted(v) if isinstance(v, frozenset) else v for key, v in chosen.items()}
    return job


def job_file(output: Path) -> Path:
    """Return where the description of an output's job lies: beside a file, inside a folder of parts."""
    if output.is_dir():
        return output / "job.json"
    return output.with_name(f"{output.name}.job.json")


class Output(Protocol):
    """An output, in one file or in parts."""

    @property
    def path(self) -> Path:
        """Its file or folder."""

    @property
    def empty(self) -> bool:
        """Whether no row was written yet."""


def check_job(journal: Output, job: dict[str, Any], *, mix: bool) -> None:
    """Check that an output was begun by the same job, and note the job beside it.

    RequestError names what differs, unless `mix` allows it.
    """
    path = job_file(journal.path)
    if not journal.empty and not mix:
        before = _read(path)
        differing = [name for name in {**before, **job} if before.get(name) != job.get(name)]
        if differing:
            name = differing[0]
            raise RequestError(
                f"output {journal.path}: was begun with {name} {_short(before.get(name))}, now it is "
                f"{_short(job.get(name))}; choose another output, or --mix to add to it all the same"
            )
    _write(path, {"garserve": __version__, "job": job})


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes())["job"])
    except (OSError, ValueError, LookupError, TypeError):
        raise RequestError(
            f"{path}: missing or broken; it says what the output beside it was made with (--mix goes on without)"
        ) from None


def _write(path: Path, content: dict[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise OutputError(f"output {path}: cannot be written ({error.strerror})") from None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
