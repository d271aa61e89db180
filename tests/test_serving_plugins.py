"""Which of vLLM's plugins a server has: those that vLLM has by itself, garserve's routes, and nobody else's."""

import os
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")

from garserve.serving import launch

INSTALLED = [
    ("vllm.endpoint_plugins", "garserve"),
    ("vllm.endpoint_plugins", "routes"),
    ("vllm.endpoint_plugins", "both"),
    ("vllm.general_plugins", "garserve"),
    ("vllm.general_plugins", "model"),
    ("vllm.general_plugins", "both"),
    ("vllm.general_plugins", "lora_hf_hub_resolver"),
    ("vllm.platform_plugins", "npu"),
    ("vllm.stat_logger_plugins", "logger"),
    ("vllm.stat_logger_plugins", "model"),
    ("vllm.logits_processors", "processor"),
    ("console_scripts", "command"),
]


def plugins(monkeypatch: pytest.MonkeyPatch, given: str | None) -> list[str]:
    """The names that vLLM is told to load, where the operator gave these."""
    installed = EntryPoints(EntryPoint(name, "package:thing", group) for group, name in INSTALLED)

    def entry_points(**wanted: Any) -> EntryPoints:
        return installed.select(**wanted)

    monkeypatch.setattr(launch, "entry_points", entry_points)
    monkeypatch.setenv("VLLM_PLUGINS", given or "")
    if given is None:
        monkeypatch.delenv("VLLM_PLUGINS")
    for name in launch.KEY_VARIABLES:
        monkeypatch.setenv(name, "secret")
    launch._prepare_environment()
    assert not set(launch.KEY_VARIABLES) & set(os.environ)
    return os.environ["VLLM_PLUGINS"].split(",")


def test_plugins_that_vllm_loads_by_itself_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that add routes are closed, what would open them by having the same name, and what downloads if named."""
    found = plugins(monkeypatch, None)
    assert sorted(found) == ["garserve", "logger", "model", "npu"]


@pytest.mark.parametrize(
    ("given", "found"),
    [("", ["garserve"]), ("npu,routes", ["npu", "routes", "garserve"]), ("garserve,npu", ["garserve", "npu"])],
)
def test_an_operators_list_is_kept(monkeypatch: pytest.MonkeyPatch, given: str, found: list[str]) -> None:
    assert plugins(monkeypatch, given) == found


def test_groups_are_called_as_vllm_calls_them() -> None:
    from vllm import plugins as own

    groups = {value for name, value in vars(own).items() if name.endswith("_PLUGINS_GROUP")}
    assert own.ENDPOINT_PLUGINS_GROUP == launch._ENDPOINTS
    assert len(groups) > 3
    assert all(launch._PLUGIN_GROUP.fullmatch(group) for group in groups)
