"""What is done for a GPU and can be seen without one; what needs one is skipped."""

import gc
import json
import os
import subprocess
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from garserve.errors import GarserveError
from garserve.model import onnx_vision
from garserve.model.device import has_gpu
from tests.conftest import PHOTO, write_lines

vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (pip install garserve[cpu])")


NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"  # with it torch asks the driver's library, not CUDA, which forbids to fork


def test_a_gpu_is_asked_for_without_cuda() -> None:
    code = f"import os; from garserve.model.device import has_gpu; has_gpu(); print(os.environ.get({NVML!r}))"
    environment = {name: value for name, value in os.environ.items() if name != NVML}
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert run.stdout == "1\n"


@vllm
def test_engines_on_a_gpu_take_several_images_a_step(mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs  # before its platform seems another one
    from vllm.platforms import current_platform

    from garserve.config import read_config
    from garserve.vllm_plugin.arguments import engine_arguments, engine_environment, worker_arguments

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    arguments = engine_arguments(mini, read_config(mini), {"max_num_seqs": 64})
    assert (arguments["max_num_batched_tokens"], arguments["max_num_seqs"]) == (16384, 64)
    assert "max_num_seqs" not in engine_arguments(mini, read_config(mini), {})
    assert "enforce_eager" not in arguments
    assert EngineArgs(model=str(mini)).max_num_batched_tokens is None  # which would become vLLM's 2,048
    assert worker_arguments(arguments) == {}
    monkeypatch.undo()
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    with engine_environment(2, separate_process=False):
        assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
        assert not current_platform.is_cpu() or worker_arguments({}), (
            "what garserve has set for one engine is no user's wish for another"
        )
    assert "VLLM_WORKER_MULTIPROC_METHOD" not in os.environ


class _Broken:
    """An engine that fails in its first step, with its weights in the frame of the failure."""

    engine_core = SimpleNamespace(shutdown=lambda: None)

    def has_unfinished_requests(self) -> bool:
        return True

    def step(self) -> list[Any]:
        weights = self
        raise RuntimeError(f"out of memory, {type(weights).__name__}")


@vllm
def test_an_engine_that_failed_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    from garserve.vllm_plugin import driver

    engines = [_Broken()]
    left = weakref.ref(engines[0])
    monkeypatch.setattr(driver, "_make_engine", lambda *_: engines.pop())
    failed = driver.EngineDriver({})
    failed._thread.join(10)
    gc.collect()
    assert left() is None
    with pytest.raises(GarserveError, match="the engine has stopped: RuntimeError: out of memory, _Broken"):
        failed.call(lambda engine: engine)
    failed.close()


def test_an_exported_tower_runs_on_its_rank_s_own_gpu() -> None:
    asked: list[Any] = []

    def session(_: str, __: Any, providers: list[Any]) -> SimpleNamespace:
        asked.extend(providers)
        return SimpleNamespace(get_providers=lambda: [name for name, _ in providers])

    runtime = SimpleNamespace(SessionOptions=SimpleNamespace, InferenceSession=session)
    onnx_vision._open(runtime, Path("a.onnx"), "CUDAExecutionProvider", torch.device("cuda", 1), 1)
    onnx_vision._open(runtime, Path("a.onnx"), "CPUExecutionProvider", torch.device("cpu"), 1)
    assert asked == [("CUDAExecutionProvider", {"device_id": "1"}), ("CPUExecutionProvider", {})]


@pytest.mark.skipif(not has_gpu(), reason="no GPU is here")
def test_encoded_on_a_gpu_as_on_the_cpu(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_lines(tmp_path / "in.jsonl", [{"image": str(PHOTO), "regions": [{"box": [10, 10, 90, 90]}]}])
    found = []
    for name, hidden in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        command = [
            sys.executable,
            "-m",
            "garserve",
            "encode",
            "-i",
            tmp_path / "in.jsonl",
            "-o",
            tmp_path / name,
            "--json",
        ]
        done = subprocess.run(command, env={**os.environ, **hidden}, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["files"] == 1
        (file,) = (tmp_path / name).glob("*.safetensors")
        found.append(load_file(file))
    for name, rows in found[1].items():
        torch.testing.assert_close(found[0][name], rows, rtol=1e-3, atol=1e-3)
