"""The errors that users see: each says which input, which field, what was expected and what came."""


class GarserveError(ValueError):
    """Base of every error that garserve raises on purpose."""


class InputError(GarserveError):
    """An image, a region or a request that cannot be used."""


class ImageError(InputError):
    """An image that cannot be read, or that is refused."""


class RegionError(InputError):
    """A region that is malformed, lies outside its image, or covers no pixel."""


class RequestError(InputError):
    """Regions, question and options that do not fit together or do not fit the checkpoint."""


class CheckpointError(GarserveError):
    """A checkpoint folder whose files are missing, unsafe, or not those of a GAR model."""


class OnnxError(GarserveError):
    """An exported model that is missing, damaged or of another checkpoint, or that cannot run here as asked."""


def first_line(error: BaseException) -> str:
    """Return the first line of a foreign error's message, "no details" where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no details"
