"""What garserve tells vLLM, as vLLM reads it; no engine is started."""

from pathlib import Path
from typing import Any

import pytest

from garserve.checkpoint import Checkpoint
from garserve.errors import RequestError
from garserve.serving.settings import Settings

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
pytestmark = pytest.mark.vllm

TOWER = (Path("/towers/a"), "CPUExecutionProvider")


def _tell(config: Any) -> Any:
    config.seen = config.vision_model
    return config


def _config(mini: Path, overrides: Any, **choices: Any) -> Any:
    """The config that vLLM makes of the engine arguments."""
    from vllm import EngineArgs

    from garserve.vllm_plugin.arguments import engine_arguments

    opened = Checkpoint.open(mini)
    options = {"hf_overrides": overrides}
    arguments = engine_arguments(opened.folder, opened.config, options, **choices)
    return EngineArgs(**arguments).create_model_config().hf_config


def test_overrides_of_the_config_leave_the_exported_tower_and_the_tile_cache(mini: Path) -> None:
    config = _config(mini, {"my_own": 3}, tile_cache_gb=0.125, vision=TOWER)
    found = (config.my_own, config.tile_cache_gb, config.vision_model, config.vision_provider)
    assert found == (3, 0.125, "/towers/a", "CPUExecutionProvider")


def test_a_function_that_overrides_is_given_the_config_with_garserve_s_choices(mini: Path) -> None:
    config = _config(mini, _tell, tile_cache_gb=0.125, vision=TOWER)
    assert (config.seen, config.vision_model, config.tile_cache_gb) == ("/towers/a", "/towers/a", 0.125)


def test_the_size_of_the_tile_cache_may_be_overridden_where_it_was_not_chosen(mini: Path) -> None:
    assert _config(mini, {"tile_cache_gb": 2}).tile_cache_gb == 2
    assert _config(mini, {"tile_cache_gb": 2}, tile_cache_gb=2).tile_cache_gb == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tile_cache_gb": 2}, r"expected tile_cache_gb as by garserve's own option tile_cache_gb \(0.125\), got 2;"),
        ({"vision_model": "b"}, r"own option vision_model \('/towers/a'\), got 'b'; give it by that option alone"),
        ({"replay_box_scale": "other"}, r"own option box_scale \('\w+'\), got 'other'"),
        ('{"tile_cache_gb": 2}', "hf_overrides: expected an object of names and values, got '{"),
    ],
)
def test_overrides_against_garserve_s_own_options_are_refused(mini: Path, overrides: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        _config(mini, overrides, tile_cache_gb=0.125, vision=TOWER)


def test_a_servers_overrides_stand_beside_garserves_own() -> None:
    from garserve.serving.launch import Launch, _arguments

    launch = Launch("tiny", Settings(), tile_cache_gb=1.0, vllm_arguments=["--hf-overrides", '{"my": 1}'])
    overrides = _arguments(launch, Checkpoint.open("tiny"), (Path("/exported"), "CPU")).hf_overrides
    own = {"tile_cache_gb": 1.0, "vision_model": "/exported", "vision_provider": "CPU"}
    assert overrides == {"replay_box_scale": "geometric", **own, "my": 1}


def test_a_server_refuses_what_an_engine_refuses() -> None:
    from garserve.serving.launch import Launch, serve

    with pytest.raises(RequestError, match="'revision': expected none, got 'v2'"):
        serve(Launch("tiny", Settings(), engine_options={"revision": "v2"}))
