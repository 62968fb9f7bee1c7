"""A task whose jobs read and write files, for executors whose workers may not see the run's folder."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nas.errors import RunError

Report = Callable[[dict[str, Any]], None]


def setup(options: dict[str, Any]) -> Callable[[dict[str, Any], Report], dict[str, Any]]:
    """Jobs count in checkpoints/<trial>/count from where they find it to payload["to"]."""
    folder = Path(options["folder"])
    sent = folder / "shipped" / "given.txt"
    given = sent.read_text() if sent.is_file() else ""

    def evaluate(payload: dict[str, Any], report: Report) -> dict[str, Any]:
        if payload.get("full") and os.environ.get("NAS_TEST_DISK") == "full":
            raise RunError(f"{folder}: no space left on device")
        count = folder / "checkpoints" / str(payload["trial"]) / "count"
        begin = int(count.read_text()) if count.is_file() else 0
        for step in range(begin, payload["to"]):
            count.parent.mkdir(parents=True, exist_ok=True)
            count.write_text(str(step + 1))
            report({"count": step + 1})
            if step + 1 == payload.get("die_at"):
                os._exit(1)
        (folder / "result.bin").write_bytes(b"x" * payload.get("bytes", 0))
        time.sleep(payload.get("sleep", 0.0))
        return {
            "begin": begin,
            "folder": str(folder),
            "given": given,
            "pid": os.getpid(),
            "node": os.environ.get("NAS_TEST_NODE", ""),
            "code": str(Path(sys.modules["nas"].__file__ or "").parent),
        }

    return evaluate
