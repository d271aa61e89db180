"""`garserve bench`: what it counts, what it refuses, and load on a small server that is made up."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import garserve
from garserve.bench import cost, latency
from garserve.bench.load import Outcome, bodies, closed_loop, open_loop
from garserve.bench.machine import Peaks, machine, peaks
from garserve.bench.serve import Limits, serve
from garserve.bench.workload import KINDS, make_workload, picture, region
from garserve.cli import app
from garserve.config import parse_config, read_config
from garserve.errors import GarserveError, RequestError
from garserve.inputs.images import hold_image
from garserve.inputs.processor import Processor
from garserve.inputs.regions import Region
from garserve.inputs.request import RegionRequest
from garserve.model.reference import ReferenceGAR
from garserve.presets import preset
from garserve.tracing import Span, recording, span, write_chrome_trace
from tests.conftest import ROOT

runner = CliRunner()
SIZE = (120, 90)


@pytest.fixture(scope="module")
def tiny() -> Iterator[garserve.Engine]:
    with garserve.load(backend="reference") as engine:
        yield engine


# ---- spans


def test_spans_are_kept_while_somebody_records(tmp_path: Path) -> None:
    with span("before"):
        pass
    with recording() as spans:
        with span("outer"), span("inner"):
            time.sleep(0.002)
        thread = threading.Thread(target=_elsewhere, name="other")
        thread.start()
        thread.join()
    with span("after"):
        pass
    assert [(one.name, one.thread == "other") for one in spans] == [("inner", False), ("outer", False), ("there", True)]
    assert spans[1].seconds >= spans[0].seconds >= 0.002
    write_chrome_trace(tmp_path / "trace.json", spans)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    whole = {event["name"]: event for event in events if event["ph"] == "X"}
    assert whole["outer"]["ts"] == 0
    assert whole["outer"]["ts"] <= whole["inner"]["ts"]
    assert whole["inner"]["dur"] == pytest.approx(spans[0].seconds * 1e6)


def _elsewhere() -> None:
    with span("there"):
        pass


def test_a_recording_is_the_only_one() -> None:
    with recording(), pytest.raises(RuntimeError, match="under way"), recording():
        pass
    with recording() as spans, span("again"):
        pass
    assert len(spans) == 1


def test_a_span_survives_an_exception() -> None:
    with recording() as spans, pytest.raises(ValueError, match="x"), span("failing"):
        raise ValueError("x")
    assert [one.name for one in spans] == ["failing"]


# ---- costs


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


# ---- images that are held


def test_a_held_image_is_the_engines_own() -> None:
    own = np.zeros((8, 9, 3), np.uint8)
    held = hold_image(own)
    own[:] = 7
    assert not held.any()
    assert not held.flags.writeable
    assert hold_image(held) is held
    assert hold_image(ROOT / "garserve" / "data" / "coffee.jpg").flags.writeable is False


def test_an_image_is_known_by_its_pixels_when_they_may_change(mini: Path) -> None:
    processor = Processor(mini, read_config(mini))
    box = [[10, 10, 60, 60]]
    own = picture(0, SIZE).copy()
    first = processor(RegionRequest(own, box)).items[0].hash
    own[:] = picture(1, SIZE)
    second = processor(RegionRequest(own, box)).items[0].hash
    assert first != second
    for number, expected in ((0, first), (1, second)):
        held = hold_image(picture(number, SIZE).copy())
        assert [processor(RegionRequest(held, box)).items[0].hash for _ in range(2)] == [expected] * 2
    fewer = processor.variant(max_num_tiles=1)
    assert fewer(RegionRequest(held, box)).items[0].hash == fewer(RegionRequest(held.copy(), box)).items[0].hash


def test_ids_of_images_that_are_gone_name_nothing(mini: Path) -> None:
    processor = Processor(mini, read_config(mini))
    for number in range(200):  # memory, and with it the id, is taken again by the next image
        held = hold_image(np.full((20, 20, 3), number % 250, np.uint8))
        assert int(processor(RegionRequest(held, [[1, 1, 9, 9]])).items[0].tiles[0, 0, 0, 0]) == number % 250
        del held


# ---- workloads


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


# ---- latency


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


def test_stages_are_told_apart_by_the_first_token() -> None:
    spans = [Span(*one, "t") for one in (("preprocess", 0, 1), ("vision", 1, 2), ("decoder", 3, 4), ("decoder", 8, 1))]
    spans += [Span("engine step", 1, 6.5, "t"), Span("engine step", 8, 1.5, "t")]
    found = latency._stages(spans, 7.5, 10.0)
    assert (found["prefill"], found["decode"], found["engine"], found["between"]) == (4, 1, 1, 1)


# ---- a server's load


class _Handler(BaseHTTPRequestHandler):
    """Streams an answer of five pieces, 20 ms apart; refuses what has no regions."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)  # type: ignore[attr-defined]
        image = body["messages"][0]["content"][0]
        if not image.get("regions") or body["model"] != "tiny":
            self.send_response(400)
            text = b'{"error": {"message": "no regions"}}'
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        pieces: list[dict[str, Any]] = [{"choices": [{"delta": {"role": "assistant"}}]}]
        pieces += [{"choices": [{"delta": {"content": f"w{i} "}}]} for i in range(5)]
        pieces += [{"choices": [], "usage": {"completion_tokens": 9}}]
        for piece in pieces:
            time.sleep(0.02)
            self.wfile.write(f"data: {json.dumps(piece)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    made.bodies = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def _url(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_bodies_say_what_the_workload_asks() -> None:
    asked = make_workload("five", 1, SIZE, max_tokens=8)
    (body,) = bodies(asked, "tiny", 8)
    image, text = body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert text["text"] == asked.requests[0].question
    drawn = [Region.parse(one).mask(SIZE[1], SIZE[0]) for one in image["regions"]]
    assert all(np.array_equal(ours, mask) for ours, mask in zip(drawn, asked.requests[0].regions, strict=True))
    (single,) = bodies(make_workload("stream", 1, SIZE, max_tokens=8), "tiny", 8)
    assert len(single["messages"][0]["content"]) == 1


def test_closed_loop(server: ThreadingHTTPServer) -> None:
    requests = bodies(make_workload("dense", 1, SIZE, max_tokens=8), "tiny", 8)[:6]
    start = time.perf_counter()
    found = asyncio.run(closed_loop(_url(server), requests, clients=3))
    assert time.perf_counter() - start > 2 * 0.14
    assert sorted(map(json.dumps, server.bodies)) == sorted(map(json.dumps, requests))  # type: ignore[attr-defined]
    assert [one.error for one in found] == [None] * 6
    for outcome in found:
        assert outcome.tokens == 9
        assert 0.04 <= outcome.ttft < outcome.e2e
        assert outcome.itl == pytest.approx((outcome.e2e - outcome.ttft) / 8)


def test_open_loop_sends_at_its_times(server: ThreadingHTTPServer) -> None:
    requests = bodies(make_workload("dense", 1, SIZE, max_tokens=8), "tiny", 8)
    found = asyncio.run(open_loop(_url(server), requests, rate=100.0, seed=1))
    gaps = [after.due - one.due for one, after in pairwise(found)]
    assert np.mean(gaps) == pytest.approx(0.01, rel=0.6)
    assert np.std(gaps) > 0.003  # not evenly spaced
    assert all(one.sent >= one.due for one in found)
    # Nothing waits for an answer: all of them take 140 ms, and are sent within 200.
    assert max(one.sent for one in found) - found[0].sent < 1.0


def test_failures_are_counted_and_never_good(server: ThreadingHTTPServer) -> None:
    good = bodies(make_workload("dense", 1, SIZE, max_tokens=8), "tiny", 8)[:3]
    bad = [{**good[0], "model": "another"}]
    result = serve(_url(server) + "/v1/", [*good, *bad], "here", Limits(), clients=2)
    figures = {row["figure"]: row for row in result.rows}
    assert figures["failed"]["value"] == 1
    assert figures["good share"]["value"] == 0.75
    assert figures["TTFT"]["p50 ms"] < figures["E2E"]["p50 ms"]
    assert "status 400" in result.notes[0]
    with pytest.raises(GarserveError, match="none of 1 requests was answered: status 400"):
        serve(_url(server), bad, "here", Limits())
    with pytest.raises(GarserveError, match="none of 1 requests was answered: ConnectError"):
        serve("http://127.0.0.1:9", bad, "here", Limits())


def test_goodput_is_under_the_limits() -> None:
    fast = Outcome(due=0.0, arrivals=[0.1, 0.2], tokens=3)
    assert (fast.ttft, fast.e2e, fast.itl) == (0.1, 0.2, pytest.approx(0.05))
    assert Limits(ttft=0.1, itl=0.06, e2e=0.2).kept(fast)
    assert not Limits(ttft=0.09).kept(fast)
    assert not Limits(itl=0.04).kept(fast)
    assert not Limits(e2e=0.19).kept(fast)
    assert str(Limits()) == "none"
    assert str(Limits(ttft=0.5)) == "ttft 0.5 s"


# ---- the command line


def test_latency_command(tmp_path: Path) -> None:
    trace, saved = tmp_path / "trace.json", tmp_path / "latency.json"
    arguments = ["bench", "latency", "--backend", "reference", "--images", "2", "--size", "120x90", "--max-tokens", "8"]
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


def test_throughput_command() -> None:
    arguments = ["bench", "throughput", "--backend", "reference", "--images", "1", "--size", "120x90", "--json"]
    done = runner.invoke(app, [*arguments, "--workload", "five", "--max-tokens", "4"])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["figures"]
    assert row["regions/s"] == pytest.approx(1 / row["seconds"], rel=1e-3)
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
        (["preprocess", "--size", "640"], "--size: expected two whole numbers"),
        (["throughput", "--workload", "five", "--group", "3"], "group: expected 1 to 5"),
    ):
        done = runner.invoke(app, ["bench", *arguments])
        assert isinstance(done.exception, GarserveError), done.output
        assert message in str(done.exception)


def test_startup_tells_why_nothing_started() -> None:
    from garserve.bench.startup import startup

    with pytest.raises(GarserveError, match="the engine did not start"):
        startup("/no/such/checkpoint", "reference", 1)
