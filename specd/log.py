"""Log lines of all processes in one form: text for people, or one JSON object a line (SPECD_LOG_FORMAT)."""

from __future__ import annotations

import json
import logging
import os
import time
from typing import Final

LEVEL: Final = "SPECD_LOG"
"""The variable that tells the processes of a command its level."""
FORM: Final = "SPECD_LOG_FORMAT"
"""The variable that tells them the form, `text` or `json`."""
FORMS: Final = ("text", "json")


class JsonFormatter(logging.Formatter):
    """`{"time", "level", "logger", "process", "message"}`, with `traceback` where there is one; the time is UTC."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        said: dict[str, str | int] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "process": self._role,
            "pid": record.process or 0,
            "message": record.getMessage(),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False)


def formatter(role: str = "") -> logging.Formatter:
    """The form of this process's lines. role: what it is to people, `worker` for instance; empty for the command."""
    if as_json():
        return JsonFormatter(role or "specd")
    name = f"{role} %(name)s" if role else "%(name)s"
    return logging.Formatter(f"%(asctime)s %(levelname)s {name}: %(message)s", "%H:%M:%S")


def as_json() -> bool:
    """Whether lines are JSON."""
    return os.environ.get(FORM) == "json"


def log_as(role: str) -> None:
    """Log to the standard error of a process that a command has started, at its level and in its form."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(role))
    logging.basicConfig(level=os.environ.get(LEVEL, "WARNING"), handlers=[handler])


def error_in(line: str) -> str:
    """What a line of a command's log gives as the reason of its end, empty for any other line."""
    prefix = "specd: error: "
    if line.startswith(prefix):
        return line.removeprefix(prefix)
    try:
        said = json.loads(line)
    except ValueError:
        return ""
    ends = isinstance(said, dict) and said.get("logger") == "specd" and said.get("level") == "ERROR"
    return str(said.get("message", "")) if ends else ""
