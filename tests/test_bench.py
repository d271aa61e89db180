"""`garserve bench`: what it counts, what it asks, what it refuses."""

import errno
import io
import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import garserve
from garserve import cli_bench
from garserve.bench import cost, latency, operators, preprocess
from garserve.bench import runtime as runtime_module
from garserve.bench.kinds import KINDS
from garserve.bench.machine import Peaks, machine, peaks
from garserve.bench.options import check_targets
from garserve.bench.result import Result
from garserve.bench.runtime import Runtime, runtime
from garserve.bench.workload import make_workload, picture, region
from garserve.checkpoint import resolve
from garserve.cli import app
from garserve.config import parse_config, read_config
from garserve.errors import GarserveError, RequestError
from garserve.model.reference import ReferenceGAR
from garserve.presets import preset
from garserve.tracing import Span
from garserve.vllm_plugin.backend import VLLMBackend

runner = CliRunner()
SIZE = (120, 90)


@pytest.fixture(scope="module")
def tiny() -> Iterator[garserve.Engine]:
    with garserve.load(backend="reference") as engine:
        yield engine


def _counted(run: Any) -> int:
    # Fused attention on a CPU is not counted.
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        run()
    return int(counter.get_total_flops())


def test_flops_are_those_that_torch_counts(mini: Path) -> None:
    from garserve.checkpoint import Checkpoint

    opened = Checkpoint.open(mini)
    config, model = opened.config, ReferenceGAR.load(opened)
    tiles, side = 3, config.tile_size
    pixels, masks = torch.zeros(tiles, 3, side, side), torch.zeros(tiles, side, side)
    counted = _counted(lambda: model.encoder.projector(model.encoder.tower(pixels, masks)))
    assert tiles * cost.tile_flops(config) == pytest.approx(counted, rel=0.01)

    length = 64
    embeddings = torch.randn(1, length, config.hidden_size)
    counted = _counted(lambda: model.language_model(inputs_embeds=embeddings, logits_to_keep=1))
    heads, width, layers = (config.text[key] for key in ("num_attention_heads", "head_dim", "num_hidden_layers"))
    unneeded = length * (length - 1) / 2  # torch counts all pairs of positions, also those after
    assert cost.prefill_flops(config, length) + 4 * unneeded * heads * width * layers == pytest.approx(
        counted, rel=0.01
    )


def test_costs_of_the_released_shape() -> None:
    config = parse_config(*preset("GAR-1B"))
    assert cost.tile_flops(config) == pytest.approx(0.70e12, rel=0.03)
    assert 4734 * 1.9e9 < cost.prefill_flops(config, 4734) < 4734 * 2.5e9
    whole = cost.prefill_flops(config, 4734)
    cached = cost.prefill_flops(config, 4734, 3200)
    assert cached < whole * 0.45
    assert cost.prefill_flops(config, 3200) + cached == pytest.approx(whole, rel=1e-3)
    weights = 2 * (16 * 60.8e6 + 128262 * 2048)
    assert cost.decode_bytes(config, 0, 2) == pytest.approx(weights, rel=0.01)
    assert cost.decode_bytes(config, 1000, 2, together=8) - cost.decode_bytes(config, 0, 2) == 8 * 1000 * 2 * 16 * 1024


def test_peaks_are_measured() -> None:
    found = peaks()
    assert 1e8 < found.flops < 1e16
    assert 1e7 < found.bytes < 1e14
    assert isinstance(found, Peaks)
    assert machine()["torch"] == torch.__version__


def test_workloads_are_the_same_again_and_differ_by_image() -> None:
    assert {kind: len(make_workload(kind, 2, SIZE, max_tokens=8).requests) for kind in KINDS} == {
        "dense": 40,
        "five": 2,
        "questions": 20,
        "stream": 2,
    }
    one, other = (make_workload("dense", 1, SIZE, max_tokens=8).requests[3] for _ in range(2))
    assert np.array_equal(one.image, other.image)
    assert np.array_equal(one.regions[0], other.regions[0])
    assert not np.array_equal(picture(0, SIZE), picture(1, SIZE))
    later = make_workload("stream", 1, SIZE, max_tokens=8, first=5)
    assert np.array_equal(later.requests[0].image, picture(5, SIZE))


def test_regions_cover_what_is_said() -> None:
    shares = [region(seed, (320, 240)).mean() for seed in range(200)]
    assert 0.003 < min(shares) < 0.01
    assert 0.09 < max(shares) < 0.16


def test_groups_ask_about_each_region_once() -> None:
    asked = make_workload("dense", 1, SIZE, max_tokens=8, group=4).requests
    assert [list(one.focus or []) for one in asked] == [[i] for i in range(4)] * 5
    assert all(len(one.regions) == 4 for one in asked)
    for request in asked:
        request.check(5)
    with pytest.raises(RequestError, match="group: expected 1 to 5"):
        make_workload("five", 1, SIZE, max_tokens=8, group=2)


@pytest.mark.parametrize("kind", ["five", "questions"])
def test_questions_name_regions_that_are_there(kind: Any) -> None:
    asked = make_workload(kind, 1, SIZE, max_tokens=8).requests
    assert len({request.question for request in asked}) == len(asked)
    for request in asked:
        request.check(5)


def test_stages_sum_to_the_whole(tiny: garserve.Engine) -> None:
    request = make_workload("stream", 1, SIZE, max_tokens=6, first=3).requests[0]
    latency.measure(tiny, request)
    timeline, spans = latency.measure(tiny, request)
    assert sum(timeline.stages.values()) == pytest.approx(timeline.e2e)
    assert abs(timeline.stages["between"]) < 0.1 * timeline.e2e  # a busy machine may wait between two threads
    assert 0 < timeline.ttft < timeline.e2e
    assert len(timeline.itl) == len(timeline.token_ids) - 1
    assert timeline.e2e == pytest.approx(timeline.ttft + sum(timeline.itl), rel=0.2)
    assert {"preprocess", "read image", "tile image", "vision", "replay", "decoder", "engine step"} <= {
        one.name for one in spans
    }
    answer = next(tiny.describe_many([request]))
    assert answer.token_ids == [token for token in timeline.token_ids if token != tiny.stop_id]


def test_steps_that_a_gpu_replays_are_decoding() -> None:
    """Of their model, only the logits have a span."""
    spans = [Span(*one, "t") for one in (("vision", 1, 2), ("decoder", 3, 4), ("decoder", 9.25, 0.25))]
    spans += [Span("engine step", 1, 6.5, "t"), Span("engine step", 8, 1.5, "t")]
    found = latency._stages(spans, 7.5, 10.0, graphs=True)
    assert (found["prefill"], found["decode"], found["engine"], found["between"]) == (4, 1.5, 0.5, 2)


def test_stages_are_told_apart_by_the_first_token() -> None:
    spans = [Span(*one, "t") for one in (("preprocess", 0, 1), ("vision", 1, 2), ("decoder", 3, 4), ("decoder", 8, 1))]
    spans += [Span("engine step", 1, 6.5, "t"), Span("engine step", 8, 1.5, "t")]
    found = latency._stages(spans, 7.5, 10.0)
    assert (found["prefill"], found["decode"], found["engine"], found["between"]) == (4, 1, 1, 1)


def test_latency_command(tmp_path: Path) -> None:
    trace, saved = tmp_path / "trace.json", tmp_path / "latency.json"
    arguments = ["bench", "latency", "--backend", "reference", "--images", "1", "--size", "120x90", "--max-tokens", "8"]
    done = runner.invoke(app, [*arguments, "--trace", str(trace), "--save", str(saved), "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document == json.loads(saved.read_text())
    shares = [row["share"] for row in document["figures"] if row["stage"] in latency.STAGES]
    assert sum(shares) == pytest.approx(1.0, abs=0.05)
    assert {"TTFT", "ITL", "E2E"} <= {row["stage"] for row in document["figures"]}
    assert document["machine"]["threads"] >= 1
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"preprocess", "vision", "replay", "decoder"} <= names


@pytest.mark.parametrize(
    ("gaps", "milliseconds"), [([[], [0.2, 0.4]], pytest.approx(300)), ([[], [0.2], []], pytest.approx(200))]
)
def test_answers_of_one_token_have_no_gap(
    monkeypatch: pytest.MonkeyPatch, tiny: garserve.Engine, gaps: list[list[float]], milliseconds: Any
) -> None:
    assert timed(monkeypatch, tiny, gaps)["ITL"]["milliseconds"] == milliseconds
    assert "ITL" not in timed(monkeypatch, tiny, [[], []])


def timed(monkeypatch: pytest.MonkeyPatch, engine: garserve.Engine, gaps: list[list[float]]) -> dict[str, Any]:
    """Rows of `bench latency` by stage, for answers with these seconds between their tokens."""
    stages = dict.fromkeys(latency.STAGES, 1 / len(latency.STAGES)) | {"between": 0.0}
    lines = [latency.Timeline(stages, 0.5, gap, 1.0, 9, 0, [1] * (len(gap) + 1), 1, 1) for gap in gaps]
    monkeypatch.setattr(latency, "peaks", lambda dtype: Peaks(1e12, 1e10))
    monkeypatch.setattr(latency, "measure", lambda engine, request: (request, []))
    result, _ = latency.latency(engine, lines, lines[0], "here")  # type: ignore[arg-type]
    return {str(row["stage"]): row for row in result.rows}


def test_throughput_command() -> None:
    arguments = ["bench", "throughput", "--backend", "reference", "--images", "1", "--size", "120x90", "--json"]
    done = runner.invoke(app, [*arguments, "--workload", "five", "--max-tokens", "4"])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["figures"]
    assert row["answers/s"] == pytest.approx(1 / row["seconds"], rel=1e-3)
    assert "tower in torch, float32" in json.loads(done.stdout)["conditions"]
    assert 0 < row["tiles computed"] <= 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["replay", "--grid", "1x1", "--rounds", "1"],
        ["vision", "--tiles", "1", "--depth", "1", "--rounds", "1"],
        ["preprocess", "--size", "120x90", "--regions", "2", "--rounds", "1"],
    ],
)
def test_parts_command(arguments: list[str]) -> None:
    done = runner.invoke(app, ["bench", *arguments])
    assert done.exit_code == 0, done.output
    assert torch.__version__ in done.output.replace("\n", "")
    assert "limit" in done.output


def test_commands_refuse_what_they_cannot_do(tmp_path: Path) -> None:
    for arguments, message in (
        (["vision", "--save", str(tmp_path / "no" / "file.json")], "no such folder"),
        (["latency", "--trace", str(tmp_path)], "expected a file that can be written"),
        (["serve", "http://127.0.0.1:9", "--save", str(tmp_path)], "expected a file that can be written"),
        (["preprocess", "--size", "640"], "--size: expected two whole numbers"),
        (
            ["preprocess", "--size", "1x1"],
            "--size: expected two whole numbers from 2 to 20000 as in 640x480, got '1x1'",
        ),
        (["latency", "--size", "2x1"], "--size: expected two whole numbers from 2"),
        (
            ["latency", "--save", str(tmp_path / "x"), "--trace", f"{tmp_path}/./x"],
            "--save and --trace, got it for both",
        ),
        (["throughput", "--workload", "five", "--group", "3"], "group: expected 1 to 5"),
        (
            ["throughput", "--regions", "masks.jsonl", "--workload", "dense"],
            "--workload: expected it without --regions",
        ),
        (["throughput", "--regions", "masks.jsonl", "--images", "2"], "--images: expected it without --regions"),
        (["throughput", "--regions", "masks.jsonl", "--size", "99x99"], "--size: expected it without --regions"),
        (["throughput", "--regions", "masks.jsonl", "--group", "2"], "--group: expected it without --regions"),
        (["serve", "http://127.0.0.1:9", "--rate", "1", "--clients", "8"], "--clients: expected it without --rate"),
    ):
        done = runner.invoke(app, ["bench", *arguments])
        assert isinstance(done.exception, GarserveError), done.output
        assert message in str(done.exception)


def test_folders_that_cannot_be_written_to_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(RequestError, match=r"t\.json: expected a folder that can be written to"):
        check_targets(None, tmp_path / "t.json")


def test_figures_outlive_a_trace_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are shown and saved first; what is wrong with the trace is told as any error."""

    def full(path: Path, spans: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    result = Result("latency", "here", [{"stage": "end to end", "ms": 7.0}])
    monkeypatch.setattr("garserve.tracing.write_chrome_trace", full)
    monkeypatch.setattr("garserve.cli_bench.open_engine", lambda *one, **more: nullcontext())
    monkeypatch.setattr(latency, "latency", lambda *one: (result, []))
    saved = tmp_path / "figures.json"
    arguments = ["--images", "1", "--size", "120x90", "--json", "--save", str(saved)]
    done = runner.invoke(app, ["bench", "latency", *arguments, "--trace", str(tmp_path / "t.json")])
    assert isinstance(done.exception, GarserveError), done.output
    assert "--trace" in str(done.exception)
    assert "cannot be written (No space left on device)" in str(done.exception)
    assert json.loads(done.stdout)["figures"] == json.loads(saved.read_text())["figures"] != []


def test_a_trace_outlives_figures_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both files are tried and the figures shown, before what is wrong is told."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    result = Result("latency", "here", [{"stage": "end to end", "ms": 7.0}])
    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr("garserve.tracing.write_chrome_trace", lambda path, spans: path.write_bytes(b"spans"))
    monkeypatch.setattr("garserve.cli_bench.open_engine", lambda *one, **more: nullcontext())
    monkeypatch.setattr(latency, "latency", lambda *one: (result, []))
    saved, trace = tmp_path / "figures.json", tmp_path / "t.json"
    arguments = ["--images", "1", "--size", "120x90", "--json", "--save", str(saved), "--trace", str(trace)]
    done = runner.invoke(app, ["bench", "latency", *arguments])
    assert isinstance(done.exception, GarserveError), done.output
    assert str(done.exception) == f"--save {saved}: cannot be written (No space left on device)"
    assert json.loads(done.stdout)["figures"] == [{"stage": "end to end", "ms": 7.0}]
    assert trace.read_bytes() == b"spans"


def test_texts_of_a_server_are_shown_as_they_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are neither markup, which could end the command, nor orders to a terminal; the file is written first."""
    note = "first failure: no [/models/GAR-1B], [body] is [red] :smile: \x1b[2J"
    result = Result("serve", "at [/here]", [{"figure": "[/one]"}, {"figure": "[b]two"}], [note])
    screen, saved = Console(file=io.StringIO(), width=200), tmp_path / "figures.json"
    monkeypatch.setattr(cli_bench, "console", screen)
    cli_bench._show(result, False, saved)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert note.replace("\x1b", "\N{REPLACEMENT CHARACTER}") in shown
    assert all(text in shown for text in ("at [/here]", "[/one]", "[b]two"))
    Result("serve", "here", [{"[/figure]": "[/one]"}]).show(screen)

    saved.unlink()
    monkeypatch.setattr(Result, "show", Mock(side_effect=BrokenPipeError))
    with pytest.raises(BrokenPipeError):
        cli_bench._show(result, False, saved)
    assert json.loads(saved.read_text())["notes"] == [note]


@pytest.mark.parametrize("options", [[], ["async_scheduling=true"], ["seed=1"]])
def test_latency_is_measured_one_step_at_a_time(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    """A step that is sent ahead would be counted in TTFT; whoever asks for it has it, and conditions say which."""
    opened: list[Any] = []
    measured = Mock(return_value=(Result("latency", "here", [{"stage": "E2E"}]), []))

    def open_engine(checkpoint: str, backend: str, given: list[str] | None, *_: Any, **__: Any) -> Any:
        opened.append(given)
        return nullcontext()

    monkeypatch.setattr("garserve.cli_bench.open_engine", open_engine)
    monkeypatch.setattr(latency, "latency", measured)
    told = [part for option in options for part in ("--engine-option", option)]
    arguments = ["bench", "latency", "--images", "1", "--size", "120x90", "--json", *told]
    assert runner.invoke(app, arguments).exit_code == 0
    wanted = options if "async_scheduling=true" in options else [*options, "async_scheduling=false"]
    assert opened == [wanted]
    assert all(f"--engine-option {option}" in measured.call_args.args[3] for option in wanted)
    assert runner.invoke(app, [*arguments, "--backend", "reference"]).exit_code == 0
    assert opened[1] == (options or None)


def test_stages_of_another_process_are_not_taken_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be zeros: the engine's spans stay where its model runs."""
    uniproc = pytest.importorskip("vllm.v1.executor.uniproc_executor")
    multiproc = pytest.importorskip("vllm.v1.executor.multiproc_executor")
    backend: Any = object.__new__(VLLMBackend)
    engine: Any = SimpleNamespace(backend=backend)
    monkeypatch.setattr(latency, "measure", Mock(side_effect=AssertionError))
    here = SimpleNamespace(model_executor=object.__new__(uniproc.UniProcExecutor))
    ranks = SimpleNamespace(model_executor=object.__new__(multiproc.MultiprocExecutor))
    for vllm_engine in (SimpleNamespace(), ranks):
        backend.driver = SimpleNamespace(engine=vllm_engine)
        with pytest.raises(RequestError, match=r"runs its model in this process, .* separate_process or several ranks"):
            latency.latency(engine, [], Mock(), "here")
    backend.driver = SimpleNamespace(engine=here)
    assert runtime_module.stages_seen(engine)
    del here.model_executor, ranks.model_executor  # neither was started, so neither can be shut down


def test_serve_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("garserve.cli_bench.find_spec", lambda name: None)
    done = runner.invoke(app, ["bench", "serve", "http://127.0.0.1:9"])
    assert "garserve[serve]" in str(done.exception)


def test_startup_tells_why_nothing_started() -> None:
    from garserve.bench.startup import startup

    with pytest.raises(GarserveError, match="the engine did not start"):
        startup("/no/such/checkpoint", "reference", 1)


@pytest.mark.parametrize("fault", ["not written", "wrong"])
def test_replay_of_every_count_is_checked(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """An operator that fails for more than one region gives no figures."""
    whole = operators.roi_replay

    def faulty(*tensors: Any) -> None:
        _, _, regions, _, out, side = tensors
        last = out[-(side**2) :].clone()
        whole(*tensors)
        if len(regions) > 1:
            out[-(side**2) :] = last if fault == "not written" else 0.0

    monkeypatch.setattr(operators, "_COUNTS", (1, 2))
    monkeypatch.setattr(operators, "peaks", lambda dtype: Peaks(1e9, 1e9))
    config = read_config(resolve("tiny"))
    assert [row["regions"] for row in operators.replay(config, (2, 1), "float32", 1).rows] == [1, 2]
    monkeypatch.setattr(operators, "roi_replay", faulty)
    with pytest.raises(GarserveError, match=r"replay: 2 regions: .*no figures"):
        operators.replay(config, (2, 1), "float32", 1)


def test_a_mask_tile_is_written_in_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "peaks", lambda: Peaks(1.0, 1.0))  # limits are bytes
    rows = preprocess.preprocess(resolve("tiny"), SIZE, 2, None, 1).rows
    pixels, tiles, side = SIZE[0] * SIZE[1], 2, 168
    assert rows[0]["limit ms"] == 1e3 * (3 * pixels + 3 * tiles * side**2)
    assert rows[1]["limit ms"] == 1e3 * (pixels + tiles * side**2 / 8)


def test_limits_are_of_what_ran(tiny: garserve.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime(tiny) == Runtime("torch, float32", "float32", "float32")
    exported = SimpleNamespace(provider="CPUExecutionProvider", info=SimpleNamespace(dtype="int8"))
    encoder: Any = tiny.backend.model.encoder  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "vision", exported)
        assert runtime(tiny) == Runtime("ONNX Runtime (CPUExecutionProvider), int8", "float32", "float32")

    config = SimpleNamespace(vision_model="tower.onnx", vision_provider="CPUExecutionProvider")
    backend: Any = object.__new__(VLLMBackend)
    model_config = SimpleNamespace(dtype=torch.bfloat16, hf_config=config)
    compilation = SimpleNamespace(cudagraph_mode=None)
    vllm_config = SimpleNamespace(model_config=model_config, compilation_config=compilation)
    backend.driver = SimpleNamespace(engine=SimpleNamespace(vllm_config=vllm_config))
    engine: Any = SimpleNamespace(backend=backend, processor=tiny.processor)
    monkeypatch.setattr(runtime_module, "read_info", lambda path: SimpleNamespace(dtype="fp32"))
    ran = runtime(engine)
    assert ran == Runtime("ONNX Runtime (CPUExecutionProvider), fp32", "float32", "bfloat16")
    config.vision_model = None
    assert runtime(engine) == Runtime("torch, bfloat16", "bfloat16", "bfloat16")
    compilation.cudagraph_mode = SimpleNamespace(has_full_cudagraphs=lambda: True)
    assert runtime(engine) == Runtime("torch, bfloat16", "bfloat16", "bfloat16", graphs=True)

    monkeypatch.setattr(
        latency, "peaks", lambda dtype: {"float32": Peaks(100.0, 1.0), "bfloat16": Peaks(7.0, 1.0)}[dtype]
    )
    line = latency.Timeline({}, 0.1, [0.1], 0.2, 10, 0, [1, 2], 3, 1)
    limits = latency._limits([line], tiny.processor.config, ran)
    assert limits["vision"] == 3 * cost.tile_flops(tiny.processor.config) / 100.0
    assert limits["prefill"] == cost.prefill_flops(tiny.processor.config, 10) / 7.0
    assert limits["replay"] == cost.replay_bytes(tiny.processor.config, 2)
