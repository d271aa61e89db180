"""The house: imports go down its floors, never up, and importing the package is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The longest matching prefix decides.
FLOORS = {
    "garserve": 0,  # the package itself: lazy names only
    "garserve.errors": 0,
    "garserve.openmp": 0,
    "garserve.targets": 0,
    "garserve.config": 1,
    "garserve.presets": 1,
    "garserve.generation": 1,
    "garserve.answers": 1,
    "garserve.tracing": 1,
    "garserve.kernels": 1,
    "garserve.inputs": 2,
    "garserve.checkpoint": 2,
    "garserve.model": 3,
    "garserve.vllm_plugin": 4,
    "garserve.export": 4,
    "garserve.backends": 4,
    "garserve.chat": 4,
    "garserve.engine": 5,
    "garserve.client": 5,
    "garserve.client_answers": 4,
    "garserve.client_wire": 4,
    "garserve.batch": 6,
    "garserve.serving": 6,
    "garserve.conformance": 6,
    "garserve.evaluation": 7,
    "garserve.bench": 7,
    "garserve.pictures": 5,
    "garserve.demo": 7,
    "garserve.doctor": 6,
    "garserve.cli_options": 6,
    "garserve.cli_shared": 7,
    "garserve.cli_batch": 8,
    "garserve.cli_bench": 8,
    "garserve.cli_batch_options": 7,
    "garserve.cli_batch_targets": 7,
    "garserve.cli_report": 8,
    "garserve.cli_eval": 8,
    "garserve.cli_doctor": 8,
    "garserve.cli_encode": 8,
    "garserve.cli_export": 8,
    "garserve.cli_serve": 8,
    "garserve.cli": 9,
    "garserve.__main__": 10,
}


def modules() -> dict[str, Path]:
    found = {}
    for top, package in (("garserve", "garserve"), ("kernels", "garserve.kernels"), ("export", "garserve.export")):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT / top).with_suffix("").parts
            name = ".".join((package, *parts))
            found[name.removesuffix(".__init__")] = path
    return found


def floor(module: str) -> int:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (known := FLOORS.get(".".join(parts[:length]))) is not None and (length > 1 or module == "garserve"):
            return known
    raise AssertionError(f"{module} has no floor: add it to FLOORS")


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {name for name in names if name.split(".")[0] == "garserve"}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down(module: str) -> None:
    path = modules()[module]
    if module == "garserve":
        return_names = imports_of(path)
        assert all(name.startswith("garserve.") for name in return_names)
        return
    own = floor(module)
    room = ".".join(module.split(".")[:2])
    for name in imports_of(path):
        if name == "garserve":
            assert own >= 5, f"{module} imports the package's face"
            continue
        other = floor(name)
        same_room = ".".join(name.split(".")[:2]) == room
        assert other < own or same_room, f"{module} (floor {own}) imports {name} (floor {other})"


def test_rooms_have_no_circles() -> None:
    graph = {name: imports_of(path) & set(modules()) for name, path in modules().items() if name != "garserve"}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert done - {"garserve"} == set(graph)


def test_kernels_know_nothing_of_garserve() -> None:
    for name, path in modules().items():
        if name.startswith("garserve.kernels"):
            assert all(other.startswith("garserve.kernels") for other in imports_of(path)), name


def test_import_is_light_and_quick() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import garserve; spent = time.perf_counter() - start;"
        "print(spent, [m for m in ('torch', 'vllm', 'transformers', 'onnxruntime', 'numpy') if m in sys.modules])"
    )
    best = 9.0
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
        spent, heavy = out.stdout.strip().split(" ", 1)
        assert heavy == "[]"
        best = min(best, float(spent))
    assert best < 0.3


def test_transformers_imports_from_the_repository_root() -> None:
    """The top-level folder `kernels` must not be taken for the Hugging Face package of that name."""
    code = (
        "from transformers.utils.import_utils import is_kernels_available; from transformers import LlamaForCausalLM;"
        "print(is_kernels_available())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "False"
