"""An image whose vision half was computed elsewhere: embeddings in the place of pixels, in a safetensors file."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from garserve.config import GARConfig
from garserve.errors import InputError

SUFFIX = ".safetensors"
_FORMAT = "garserve encoded image 1"
_READABLE = 0o644


@dataclass(frozen=True)
class EncodedImage:
    """What `garserve encode` makes of one image with a set of regions, and what an engine takes instead of both."""

    image: torch.Tensor  # [T·n², C], the thumbnail's tokens first
    regions: torch.Tensor  # [R, n², C], in the order in which the regions were given
    checkpoint: str  # fingerprint of the vision half that computed them
    box_scale: str
    tower: str = ""  # what computed them, where that is not the tower in torch or its equal (ModelInfo.tower)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "EncodedImage":
        """Read a file. Raises InputError where it is missing, or not one of `garserve encode`."""
        if not Path(path).is_file():
            raise InputError(f"encoded image {path}: no such file")
        try:
            with safe_open(path, framework="pt") as file:
                notes = file.metadata() or {}
                if notes.get("format") != _FORMAT:
                    raise InputError(f"encoded image {path}: expected a file of `garserve encode`")
                return cls(
                    file.get_tensor("image"),
                    file.get_tensor("regions"),
                    notes["checkpoint"],
                    notes["box_scale"],
                    notes.get("tower", ""),
                )
        except (SafetensorError, KeyError) as error:
            raise InputError(f"encoded image {path}: broken or truncated ({error})") from None

    def save(self, path: Path) -> None:
        """Write a file, under another name until it is whole."""
        notes = {"format": _FORMAT, "checkpoint": self.checkpoint, "box_scale": self.box_scale}
        notes |= {"tower": self.tower} if self.tower else {}
        partial = path.with_name(path.name + ".partial")
        tensors = {"image": self.image.contiguous(), "regions": self.regions.contiguous()}
        save_file(tensors, partial, metadata=notes)
        partial.chmod(_READABLE)  # safetensors lets nobody else read, and decoders run elsewhere
        partial.replace(path)

    def check(self, config: GARConfig, fingerprint: str) -> None:
        """Check that an engine of this checkpoint can take the embeddings. Raises InputError saying why not."""
        cells, width = config.tokens_per_tile, config.hidden_size
        whole = self.image.ndim == 2 and len(self.image) >= cells and len(self.image) % cells == 0
        if not whole or self.image.shape[1] != width:
            raise InputError(f"encoded image: expected [T·{cells}, {width}], got {list(self.image.shape)}")
        if self.regions.shape[1:] != (cells, width) or not len(self.regions):
            raise InputError(f"encoded regions: expected [R, {cells}, {width}], got {list(self.regions.shape)}")
        if not self.image.is_floating_point() or self.image.dtype != self.regions.dtype:
            raise InputError(f"encoded image: expected one float dtype, got {self.image.dtype}, {self.regions.dtype}")
        if self.checkpoint != fingerprint:
            raise InputError(
                f"encoded image: computed by another checkpoint: expected the vision half {fingerprint}, "
                f"got {self.checkpoint}"
            )
        if self.box_scale != config.replay_box_scale:
            raise InputError(
                f"encoded image: box_scale: expected {config.replay_box_scale}, as the engine's, got {self.box_scale}"
            )
