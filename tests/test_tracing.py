"""Spans: kept while somebody records, whole, and written in Chrome's format."""

import json
import threading
import time
from pathlib import Path

import pytest

from garserve.tracing import recording, span, write_chrome_trace


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
