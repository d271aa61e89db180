"""Runs every check over a folder of golden cases and prints a line for each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from garserve.checkpoint import Checkpoint
from garserve.conformance.case import SCALES, Case, Finding
from garserve.conformance.inputs import check_inputs
from garserve.conformance.model import check_features, check_generation
from garserve.conformance.units import check_units
from garserve.engine import BackendName, Engine, load
from garserve.errors import GarserveError
from garserve.model.reference_backend import ReferenceBackend


def read_cases(folder: Path, only: list[str]) -> list[Case]:
    """Read the folder's cases in the order of their names; `only` keeps those named."""
    paths = sorted(path for path in folder.glob("*.json") if path.with_suffix(".safetensors").is_file())
    missing = sorted(set(only) - {path.stem for path in paths})
    if missing:
        raise GarserveError(f"{folder}: no case named {missing[0]}")
    return [Case.read(path) for path in paths if not only or path.stem in only]


def findings(folder: Path, backend: BackendName, only: list[str]) -> Iterator[Finding]:
    """Run all checks of a folder: units, then each checkpoint's cases with one engine for them all."""
    cases = read_cases(folder, only)
    if not only:
        yield from check_units(folder)
    for name in sorted({case.data["checkpoint"] for case in cases}):
        own = [case for case in cases if case.data["checkpoint"] == name]
        with start_engine(folder / name, own, backend) as engine:
            for case in own:
                try:
                    yield from check_case(case, engine)
                except Exception as error:  # a case that cannot be run has failed; the others go on
                    yield Finding(case.name, "runs", float("inf"), 0.0, f"{type(error).__name__}: {error}")


def start_engine(checkpoint: Path, cases: list[Case], backend: BackendName) -> Engine:
    """Load a float32 engine that takes the largest of the cases and gives whole rows of raw logits."""
    if backend == "reference":
        return load(checkpoint, "reference", dtype="float32")
    return load(
        checkpoint,
        "vllm",
        dtype="float32",
        max_num_tiles=max(case.data["max_num_tiles"] for case in cases),
        logprobs_mode="raw_logits",
        max_logprobs=Checkpoint.open(checkpoint).config.vocab_size,
    )


def check_case(case: Case, engine: Engine) -> Iterator[Finding]:
    """Check one case: inputs, then features where the engine is the reference, then what it generates."""
    prepared = {scale: case.prepare(engine.processor, scale) for scale in SCALES}
    yield from check_inputs(case, engine.processor, prepared["released"])
    if isinstance(engine.backend, ReferenceBackend):
        yield from check_features(case, engine.backend.model, prepared)
    yield from check_generation(case, engine, prepared)


def command(
    folder: Annotated[
        Path, typer.Argument(help="Folder of golden cases (*.json with *.safetensors), checkpoints and unit/.")
    ],
    backend: Annotated[str, typer.Option(help="What decodes: reference or vllm.")] = "reference",
    case: Annotated[list[str] | None, typer.Option(help="Only this case; may be given several times.")] = None,
) -> None:
    """Check garserve against golden vectors. Exits with 1 when any check fails, 2 when there is nothing to check."""
    if backend not in ("reference", "vllm"):
        raise typer.BadParameter(f"expected reference or vllm, got {backend!r}", param_hint="--backend")
    total = failed = 0
    try:
        for finding in findings(folder, backend, case or []):  # type: ignore[arg-type]
            typer.echo(str(finding))
            total += 1
            failed += not finding.passed
    except GarserveError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{total - failed} of {total} checks passed ({backend})")
    if not total:
        typer.echo(f"error: {folder}: no golden case found", err=True)
        raise typer.Exit(2)
    if failed:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of `python -m garserve.conformance`."""
    typer.run(command)
