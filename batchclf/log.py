"""Log lines on standard error: text for people, one JSON object a line for machines."""

import functools
import json
import logging
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
_FIELDS = "batchclf_fields"


def set_level(level: LogLevel) -> None:
    """Write lines of this level and above. Texts of articles stand in lines of `debug` alone."""
    logging.getLogger("batchclf").setLevel(level.upper())


def configure(log_format: LogFormat) -> None:
    """Send the log of the package to standard error in the given format, `info` unless set."""
    handler = _StderrHandler()
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    logger = logging.getLogger("batchclf")
    logger.handlers[:] = [handler]
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
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


def always(**values: Any) -> None:
    """Have every line from here on say these values too: keys of its JSON, as `fields` are.

    Those of an earlier call are forgotten.
    """
    for handler in logging.getLogger("batchclf").handlers:
        handler.filters[:] = [each for each in handler.filters if not isinstance(each, _Always)]
        handler.addFilter(_Always(values))


def sign(record: logging.LogRecord, name: str) -> None:
    """Say in a line that another process wrote which one it was."""
    record.msg, record.args = f"{name}: {record.getMessage()}", None
    vars(record)[_FIELDS] = {**vars(record).get(_FIELDS, {}), "worker": name}


class _Always(logging.Filter):
    """Gives values to each record that has none of that name; lets all pass."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self._values = values

    def filter(self, record: logging.LogRecord) -> bool:
        vars(record)[_FIELDS] = {**self._values, **vars(record).get(_FIELDS, {})}
        return True


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
            "time": _written_time(int(record.created)),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **vars(record).get(_FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return _TO_JSON(line)


# Made once: `json.dumps` makes an encoder at every call with options, which takes longer than a
# short line does.
_TO_JSON = json.JSONEncoder(ensure_ascii=False, default=str).encode


@functools.lru_cache(1)
def _written_time(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second))
