"""What all commands share: the two consoles, an engine behind a spinner, and a file that is asked for (floor 7)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from garserve.cli_options import OWN_OPTIONS, parse_engine_options

if TYPE_CHECKING:
    from garserve.engine import Engine

console = Console()
status_console = Console(stderr=True)


@contextmanager
def open_engine(
    checkpoint: str, backend: str, options: list[str] | None, verbose: bool, **choices: Any
) -> "Iterator[Engine]":
    """Load an engine behind a spinner, and close it. Choices that are None are left to the engine."""
    with load_engine(checkpoint, backend, options, verbose, **choices) as engine:
        yield engine


def load_engine(checkpoint: str, backend: str, options: list[str] | None, verbose: bool, **choices: Any) -> "Engine":
    """Load an engine behind a spinner; the caller closes it. Choices that are None are left to the engine."""
    from garserve.engine import load

    extra = engine_options(backend, options, verbose, **choices)
    with status_console.status(f"Loading {checkpoint} ({backend}) ..."):
        return load(checkpoint, backend, **extra)  # type: ignore[arg-type]


def engine_options(backend: str, options: list[str] | None, verbose: bool, **choices: Any) -> dict[str, Any]:
    """Return what an engine is loaded with: its options as they were told, and the choices that are not None.

    Raises RequestError for an engine option that is the command's own, whether it was chosen or not: what else the
    command does by it would not follow.
    """
    own = {"checkpoint", "backend", *(name for name in OWN_OPTIONS if name in choices)}
    extra = parse_engine_options(options, own)
    extra |= {name: choice for name, choice in choices.items() if choice is not None}
    if backend == "vllm":
        extra.setdefault("verbose", verbose)
    return extra


def write_asked(option: str, path: Path | None, write: Callable[[Path], None]) -> list[str]:
    """Write a file where one is asked for, and return what went wrong."""
    if path is None:
        return []
    try:
        write(path)
    except OSError as error:
        return [f"{option} {path}: cannot be written ({error.strerror or error})"]
    status_console.print(f"Saved {escape(str(path))}")
    return []
