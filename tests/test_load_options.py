"""What `garserve.load` refuses before anything is fetched, exported or loaded."""

import inspect
from pathlib import Path
from typing import Any

import pytest

import garserve
from garserve import engine
from garserve.checkpoint import Checkpoint
from garserve.errors import RequestError
from garserve.vllm_plugin.options import _OWN, check_options


@pytest.fixture
def nothing_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a checkpoint is opened, which may fetch it, or where its tower is chosen, which may export it."""

    def begun(*_: object, **__: object) -> None:
        raise AssertionError("something was begun before the options were read")

    monkeypatch.setattr(Checkpoint, "open", begun)
    monkeypatch.setattr(engine, "choose_vision", begun)


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("refernce", {}, "backend: expected 'vllm' or 'reference', got 'refernce'"),
        ("reference", {"batch_sise": 2}, "engine option 'batch_sise' is none of the reference's"),
        ("reference", {"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ("reference", {"dtype": "float8"}, "dtype: expected float32, bfloat16 or float16, got 'float8'"),
        ("reference", {"dtype": ["float32"]}, r"dtype: expected float32, .*, got \['float32'\]"),
        ("reference", {"tile_cache_gb": -1}, "tile_cache_gb: expected 0 or more, got -1"),
        ("vllm", {"tile_cache_gb": -1}, "tile_cache_gb: expected 0 or more, got -1"),
        ("vllm", {"model": "other/GAR"}, "engine option 'model': the checkpoint is named already, got 'other/GAR'"),
        ("vllm", {"revision": "v2"}, "engine option 'revision': expected none, got 'v2': .*hf download"),
        ("reference", {"revision": "v2"}, "engine option 'revision' is none of the reference's"),
        pytest.param(
            "vllm",
            {"max_modle_len": 3},
            "engine option 'max_modle_len' is none of vLLM's",
            marks=pytest.mark.vllm,
        ),
    ],
)
@pytest.mark.usefixtures("nothing_begun")
def test_options_are_read_first(backend: Any, options: dict[str, Any], message: str) -> None:
    if "max_modle_len" in options:
        pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
    with pytest.raises(RequestError, match=message):
        garserve.load("owner/GAR", backend, **options)


def test_garserves_own_options_of_vllm_are_known() -> None:
    from garserve.vllm_plugin.backend import VLLMBackend

    parameters = inspect.signature(VLLMBackend.__init__).parameters.values()
    named = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert named - {"max_num_tiles", "vision"} == _OWN, "load gives the other two itself"


def test_a_revision_that_is_none_is_no_revision() -> None:
    check_options({"verbose": True, "separate_process": "gpu"})
    pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
    check_options({"revision": None, "max_model_len": 4096})
    with pytest.raises(RequestError, match="'revision': expected none, got 'v2'"):
        check_options({"revision": "v2", "max_model_len": 4096})


@pytest.mark.parametrize(("revision", "expected"), [(None, None), ("v2", "v2")])
def test_plain_vllm_gets_config_and_tokenizer_of_the_revision_it_was_told(
    mini: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None, expected: str | None
) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
    from types import SimpleNamespace

    import huggingface_hub

    from garserve.vllm_plugin.multimodal import GARProcessingInfo, checkpoint_folder

    fetched = []

    def fetch(name: str, *, revision: str | None = None, **_: object) -> str:
        fetched.append((name, revision))
        return str(mini)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model_config: Any = SimpleNamespace(model="owner/GAR", revision=revision, multimodal_config=None)
    info = GARProcessingInfo.__new__(GARProcessingInfo)
    info.ctx = SimpleNamespace(  # type: ignore[assignment]
        model_config=model_config, get_hf_config=lambda: SimpleNamespace(replay_box_scale="geometric")
    )
    assert info.processor.config.replay_box_scale == "geometric"
    assert checkpoint_folder(model_config) == mini
    assert fetched == [("owner/GAR", expected)] * 2
