"""The reference as a backend: closing it ends what runs, and one request that fails takes no other with it."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import garserve
from garserve.checkpoint import Checkpoint
from garserve.errors import GarserveError, InputError, OnnxError, RequestError
from garserve.generation import Progress, Report, Sampling
from garserve.inputs.processor import PreparedRequest, Processor
from garserve.inputs.prompts import stop_token_id
from garserve.inputs.request import RegionRequest
from garserve.model.reference_backend import ReferenceBackend

TOKENS = 6


@pytest.fixture
def backend(mini: Path) -> Iterator[ReferenceBackend]:
    backend = ReferenceBackend(Checkpoint.open(mini), batch_size=1)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def processor(mini: Path) -> Processor:
    return Processor(mini, Checkpoint.open(mini).config)


@pytest.fixture(scope="module")
def asked(processor: Processor, picture: np.ndarray) -> list[PreparedRequest]:
    return [processor(RegionRequest(picture, [{"box": [5 + k, 5, 60, 50]}])) for k in range(3)]


def sampling(processor: Processor, *, stream: bool = False) -> Sampling:
    return Sampling(stop_token_id(processor.tokenizer), TOKENS, stream=stream)


def decode(backend: ReferenceBackend, asked: list[PreparedRequest], how: Sampling) -> list[list[Report]]:
    """Decode requests together, and return what each was told."""
    told: list[list[Report]] = [[] for _ in asked]
    backend._decode([(prepared, how, own.append, threading.Event()) for prepared, own in zip(asked, told, strict=True)])
    return told


def tokens(reports: list[Report]) -> list[int]:
    assert all(isinstance(report, Progress) for report in reports), reports
    assert [report.finish_reason is not None for report in reports] == [False] * (len(reports) - 1) + [True]
    return [token for report in reports for token in report.new_token_ids]


def test_close_ends_what_runs_and_what_waits(
    backend: ReferenceBackend, processor: Processor, asked: list[PreparedRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, generate = threading.Event(), backend.model.generate

    def generate_while_closing(*arguments: Any) -> Any:
        begun.set()
        while not backend._closed:
            time.sleep(0.01)
        return generate(*arguments)

    monkeypatch.setattr(backend.model, "generate", generate_while_closing)
    told: list[list[Report]] = [[] for _ in asked]
    for prepared, own in zip(asked, told, strict=True):
        backend.submit(prepared, sampling(processor), own.append)
    assert begun.wait(60)
    backend.close()
    for (report,) in told:
        assert isinstance(report, GarserveError)
        assert not isinstance(report, InputError), "no request is to blame"
        assert "closed" in str(report)


def test_what_ended_before_the_close_is_an_answer(
    backend: ReferenceBackend, processor: Processor, asked: list[PreparedRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = backend.model.generate

    def generate_and_close(*arguments: Any) -> Any:
        done = generate(*arguments)
        backend.close()
        return done

    monkeypatch.setattr(backend.model, "generate", generate_and_close)
    (reports,) = decode(backend, asked[:1], sampling(processor))
    assert len(tokens(reports)) == TOKENS


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("out of\nmemory"), OnnxError("3 tiles failed")], ids=["torch", "onnx"])
def test_only_the_request_that_fails_is_to_blame(
    backend: ReferenceBackend,
    processor: Processor,
    asked: list[PreparedRequest],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    stream: bool,
) -> None:
    how, embed = sampling(processor, stream=stream), backend.model.embed
    wanted = [tokens(reports) for reports in decode(backend, asked, how)]

    def embed_but_one(prepared: PreparedRequest) -> Any:
        if prepared is asked[1]:
            raise error
        return embed(prepared)

    monkeypatch.setattr(backend.model, "embed", embed_but_one)
    first, (refusal,), last = decode(backend, asked, how)
    assert [tokens(first), tokens(last)] == [wanted[0], wanted[2]]
    assert isinstance(refusal, InputError)
    assert f"request cannot be decoded ({type(error).__name__}: {str(error).splitlines()[0]})" == str(refusal)
    assert refusal.__cause__ is error


def test_a_stream_is_told_no_token_twice(
    backend: ReferenceBackend, processor: Processor, asked: list[PreparedRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where decoding several together fails after some of their tokens were sent."""
    how, generate = sampling(processor, stream=True), backend.model.generate
    wanted = [tokens(reports) for reports in decode(backend, asked, how)]

    def generate_in_part(prepared: Any, limits: Any, stop: int, on_token: Any) -> Any:
        done = generate(prepared, [2] * len(prepared) if len(prepared) > 1 else limits, stop, on_token)
        if len(prepared) > 1:
            raise RuntimeError("out of memory")
        return done

    monkeypatch.setattr(backend.model, "generate", generate_in_part)
    assert [tokens(reports) for reports in decode(backend, asked, how)] == wanted


def test_an_engine_goes_on_after_a_request_that_fails(
    mini: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [RegionRequest(picture, [{"box": [5 + k, 5, 60, 50]}], max_tokens=TOKENS) for k in range(4)]
    with garserve.load(mini, "reference") as engine:
        wanted = list(engine.outcomes(requests))
        encode, calls = engine.backend.model.encoder.encode, []  # type: ignore[attr-defined]

        def encode_but_first(items: Any) -> Any:
            calls.append(items[1].roi)
            if items[1].roi == calls[0]:
                raise RuntimeError("out of memory")
            return encode(items)

        monkeypatch.setattr(engine.backend.model.encoder, "encode", encode_but_first)  # type: ignore[attr-defined]
        outcomes = list(engine.outcomes(requests))
    assert isinstance(outcomes[0], RequestError)
    assert outcomes[1:] == wanted[1:]
