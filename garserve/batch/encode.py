"""The vision half of a requests file by itself: embeddings into files, and a requests file that names them."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from blake3 import blake3
from safetensors import SafetensorError

from garserve.batch.lines import identity, json_lines
from garserve.batch.record import Record
from garserve.batch.request_line import read_line
from garserve.errors import GarserveError, InputError, RequestError
from garserve.inputs.encoded import SUFFIX, EncodedImage
from garserve.inputs.processor import Processor
from garserve.inputs.request import RegionRequest
from garserve.model.encoder import RegionEncoder

REQUESTS, ERRORS = "requests.jsonl", "errors.jsonl"
_NAME_BYTES = 16


@dataclass
class Encoded:
    """What a job has done so far."""

    rows: int = 0
    errors: int = 0
    files: int = 0  # written, one for each image with its set of regions


class FileEncoder:
    """Encodes requests into a folder; a file that is there already is not computed again."""

    def __init__(
        self, encoder: RegionEncoder, processor: Processor, fingerprint: str, folder: Path, *, tower: str = ""
    ) -> None:
        """Take a checkpoint's encoder, its processor, the fingerprint of its vision half, and the folder.

        `tower` is the `ModelInfo.tower` of an exported model that computes in the encoder: other features, other files.
        """
        self._encoder, self._processor, self._fingerprint, self._folder = encoder, processor, fingerprint, folder
        self._tower = tower
        self._dtype = getattr(torch, processor.config.dtype)

    def encode(self, request: RegionRequest) -> tuple[Path, bool]:
        """Encode one request's image with all of its regions; return the file, and whether it was written.

        Values are in the checkpoint's own dtype. The name covers everything that the embeddings depend on.
        Raises InputError where the request cannot be used, GarserveError where the file cannot be written.
        """
        with _refused():
            items = self._processor.all_items(request)
        digest = blake3(f"{self._fingerprint}{self._tower}".encode())
        for item in items:
            digest.update(item.hash.encode())
        path = self._folder / f"{digest.hexdigest(_NAME_BYTES)}{SUFFIX}"
        if path.is_file():
            return path, False
        image, *regions = (rows.to(self._dtype).cpu() for rows in self._encoder.encode(items))
        scale = self._processor.config.replay_box_scale
        try:
            EncodedImage(image, torch.stack(regions), self._fingerprint, scale, self._tower).save(path)
        except (OSError, SafetensorError) as error:  # of the disk, not of the line
            raise GarserveError(f"output {path}: cannot be written ({error})") from None
        return path, True


def run_encode(
    encoder: FileEncoder, source: Path, folder: Path, *, on_row: Callable[[Encoded], None] = lambda _: None
) -> Encoded:
    """Encode every line of `source` into `folder`, and write `requests.jsonl` there, which `garserve batch` takes.

    Its lines are those of the source with the file in the place of image and regions, and with the id that the source's
    line has or gets by its number there. A bad line goes to `errors.jsonl`, and the others go on. Both files are put
    in place when all lines are done: a job that was stopped leaves those of an earlier one as they were.
    Raises GarserveError where the source cannot be read or the folder not be written to.
    """
    done = Encoded()
    with _replacing(folder / REQUESTS) as good, _replacing(folder / ERRORS) as bad:
        for place, data, error in _lines(source):
            done.rows += 1
            key = Record(place, identity(data, "id")).key
            try:
                path, written = encoder.encode(_request(data, error, source.parent))
                done.files += written
                with _refused():
                    row = json.dumps({**data, "id": key, "image": path.name, "regions": []})
                good.write(row + "\n")
            except InputError as refused:
                done.errors += 1
                bad.write(json.dumps({"id": key, "place": place, "error": str(refused)}) + "\n")
            on_row(done)
    if not done.errors:
        (folder / ERRORS).unlink()
    return done


def check_folder(source: Path, folder: Path) -> None:
    """Make the folder of the embeddings; GarserveError where it cannot be made, or would replace the source."""
    for name in (REQUESTS, ERRORS):
        if source.resolve() == (folder / name).resolve():
            raise RequestError(f"output {folder}: its {name} is the input itself")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GarserveError(f"output {folder}: cannot be made ({error.strerror or error})") from None


def _request(data: Any, error: str | None, folder: Path) -> RegionRequest:
    """Return a decoded line as a request; InputError where it cannot be one."""
    if error is not None:
        raise RequestError(error)
    with _refused():
        request = read_line(data).request(folder, max_tokens=1)
    if isinstance(request.image, EncodedImage):
        raise RequestError("image: is encoded already")
    return request


@contextmanager
def _refused() -> Iterator[None]:
    """Make whatever a line brings about while it is read and drawn an InputError."""
    try:
        yield
    except InputError:
        raise
    except MemoryError:
        raise RequestError("out of memory while it was prepared") from None
    except Exception as error:
        raise RequestError(f"cannot be used ({type(error).__name__}: {error})") from None


def _lines(source: Path) -> Iterator[tuple[str, Any, str | None]]:
    try:
        yield from json_lines(source)
    except OSError as error:
        raise RequestError(f"input {source}: cannot be read ({error.strerror or error})") from None


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """Write beside a file, and put it there when it is whole; GarserveError where that fails."""
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("w", encoding="ascii") as file:
            yield file
        beside.replace(path)
    except OSError as error:
        raise GarserveError(f"output {path}: cannot be written ({error.strerror or error})") from None
    finally:
        beside.unlink(missing_ok=True)
