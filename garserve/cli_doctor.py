"""`garserve doctor`: what this machine has, and what the kernels become on GPUs (floor 8)."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from garserve.cli_options import JsonOption
from garserve.cli_shared import console, status_console
from garserve.errors import GarserveError


def doctor(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Compile the GPU kernels instead, for GPUs that need not be here.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show versions and device, and check that vLLM sees garserve and that replay tells the truth.

    Exits with 1 when a check fails, with 2 when --kernels lacks Triton's compiler.
    """
    good = _kernels(as_json) if kernels else _machine(as_json)
    if not good:
        raise typer.Exit(1)


def _machine(as_json: bool) -> bool:
    from garserve.doctor import examine

    with status_console.status("Examining ..."):
        checks = list(examine())
    if as_json:
        typer.echo(json.dumps([check.as_json() for check in checks], indent=2))
    else:
        for check in checks:
            mark = {None: " ", True: "[green]✓[/]", False: "[red]✗[/]"}[check.passed]
            console.print(f"{mark} {check.name:<30} {escape(check.value)}", soft_wrap=True)
    return all(check.passed is not False for check in checks)


def _kernels(as_json: bool) -> bool:
    try:
        from garserve.kernels.compile_check import compile_all, interpreted, rows
    except ImportError as error:
        raise GarserveError(f"--kernels: Triton cannot be imported ({error}): pip install triton") from None
    if interpreted():
        raise GarserveError("--kernels: expected a process without TRITON_INTERPRET, which replaces the compiler")
    with status_console.status("Compiling ..."):
        compiled = list(compile_all())
    if as_json:
        typer.echo(json.dumps([asdict(one) | {"good": one.good} for one in compiled], indent=2))
    else:
        header, *lines = rows(compiled)
        table = Table(*header, title="Kernels, compiled ahead of time")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    return all(one.good for one in compiled)
