"""One line for each request and each event of the server's life: JSON for machines, or words for people."""

import json
import logging
import sys
import time
from typing import Any

logger = logging.getLogger("garserve.serving")


class JSONLines(logging.Formatter):
    """A record as one JSON object a line; `extra={"fields": {…}}` adds to it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "pid": record.process,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class Words(logging.Formatter):
    """A record as words."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        facts = " ".join(f"{name}={_printable(value)}" for name, value in getattr(record, "fields", {}).items())
        line = f"{record.levelname.lower()} {record.getMessage()} {facts}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _printable(value: object) -> str:
    """Return a value as text that stays in its line: a path is what a client sent."""
    text = str(value)
    return text if text.isprintable() else repr(text)


def set_up(form: str) -> None:
    """Write the server's lines to stderr, `form` being "json" or "text". Does nothing when they go there already."""
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines() if form == "json" else Words())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def event(name: str, **fields: Any) -> None:
    """Log an event of the server's life."""
    logger.info(name, extra={"fields": fields})
