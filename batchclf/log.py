"""Log lines on standard error: text for people, one JSON object a line for machines."""

import json
import logging
import sys
import time
import traceback
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]
_FIELDS = "batchclf_fields"


def configure(log_format: LogFormat, level: int = logging.INFO) -> None:
    """Send the log of the package to standard error in the given format."""
    handler = _StderrHandler()
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    logger = logging.getLogger("batchclf")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
    # It warns of caches and fonts, of which a run on a read-only disk has none.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def report(message: str, *, trace: bool = False) -> None:
    """Say why a command ends: as a log line where JSON is asked for, else as people expect it.

    Args:
        message: what, where, and what to do.
        trace: with the traceback of the exception that is being handled.
    """
    logger = logging.getLogger("batchclf")
    if any(isinstance(handler.formatter, _JsonFormatter) for handler in logger.handlers):
        logger.error("%s", message, exc_info=trace)
        return
    lines = traceback.format_exc() if trace else ""
    sys.stderr.write(f"{lines}Error: {message}\n")


def fields(**values: Any) -> dict[str, Any]:
    """What a log line says in words, as values: `log.info("...", extra=fields(rows=...))`.

    Keys of their own in JSON; the text is the message alone.
    """
    return {_FIELDS: values}


def sign(record: logging.LogRecord, name: str) -> None:
    """Say in a line that another process wrote which one it was."""
    record.msg, record.args = f"{name}: {record.getMessage()}", None
    vars(record)[_FIELDS] = {**vars(record).get(_FIELDS, {}), "worker": name}


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever standard error is at the moment: a progress bar puts itself before it."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Ignore what StreamHandler sets when it is made."""


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"{clock} {level}{record.getMessage()}{trace}"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **vars(record).get(_FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
