"""The vision half of a requests file by itself: embeddings into files, and a requests file that names them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from garserve.batch.lines import identity, json_lines
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

    def __init__(self, encoder: RegionEncoder, processor: Processor, fingerprint: str, folder: Path) -> None:
        """Take a checkpoint's encoder, its processor, the fingerprint of its vision half, and the folder."""
        self._encoder, self._processor, self._fingerprint, self._folder = encoder, processor, fingerprint, folder
        self._dtype = getattr(torch, processor.config.dtype)

    def encode(self, request: RegionRequest) -> tuple[Path, bool]:
        """Encode one request's image with all of its regions; return the file, and whether it was written.

        Values are in the checkpoint's own dtype. The name covers everything that the embeddings depend on.
        Raises InputError where the request cannot be used.
        """
        items = self._processor.all_items(request)
        digest = blake3(self._fingerprint.encode())
        for item in items:
            digest.update(item.hash.encode())
        path = self._folder / f"{digest.hexdigest(_NAME_BYTES)}{SUFFIX}"
        if path.is_file():
            return path, False
        image, *regions = (rows.to(self._dtype).cpu() for rows in self._encoder.encode(items))
        scale = self._processor.config.replay_box_scale
        EncodedImage(image, torch.stack(regions), self._fingerprint, scale).save(path)
        return path, True


def run_encode(
    encoder: FileEncoder, source: Path, folder: Path, *, on_row: Callable[[Encoded], None] = lambda _: None
) -> Encoded:
    """Encode every line of `source` into `folder`, and write `requests.jsonl` there, which `garserve batch` takes.

    Its lines are those of the source with the file in the place of image and regions. A bad line goes to
    `errors.jsonl` with its number, and the others go on.
    """
    done = Encoded()
    with (folder / REQUESTS).open("w", encoding="utf-8") as good, (folder / ERRORS).open("w", encoding="utf-8") as bad:
        for place, data, error in json_lines(source):
            done.rows += 1
            try:
                path, written = encoder.encode(_request(data, error, source.parent))
                done.files += written
                good.write(json.dumps({**data, "image": path.name, "regions": []}, ensure_ascii=False) + "\n")
            except InputError as refused:
                done.errors += 1
                row = {"id": identity(data, "id"), "place": place, "error": str(refused)}
                bad.write(json.dumps(row, ensure_ascii=True) + "\n")
            on_row(done)
    if not done.errors:
        (folder / ERRORS).unlink()
    return done


def check_folder(source: Path, folder: Path) -> None:
    """Make the folder of the embeddings; GarserveError where it could not be written to, or holds the source."""
    if source.resolve() == (folder / REQUESTS).resolve():
        raise RequestError(f"output {folder}: its {REQUESTS} is the input itself")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GarserveError(f"output {folder}: cannot be made ({error.strerror or error})") from None


def _request(data: Any, error: str | None, folder: Path) -> RegionRequest:
    """Return a decoded line as a request; InputError where it cannot be one."""
    if error is not None:
        raise RequestError(error)
    try:
        request = read_line(data).request(folder, max_tokens=1)
    except (TypeError, LookupError, ArithmeticError, ValueError) as refused:  # values of a kind that no field takes
        raise RequestError(f"cannot be used ({type(refused).__name__}: {refused})") from None
    if isinstance(request.image, EncodedImage):
        raise RequestError("image: is encoded already")
    return request
