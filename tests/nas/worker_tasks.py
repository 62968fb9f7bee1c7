"""What tests of `nas worker` have computed. Cheap to import."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Report = Callable[[dict[str, Any]], None]


def append(options: dict[str, Any]) -> Callable[[dict[str, Any], Report], dict[str, Any]]:
    """Every job adds its number and process to one file."""

    def evaluate(payload: dict[str, Any], report: Report) -> dict[str, Any]:
        file = os.open(options["file"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{payload['number']} {os.getppid()}\n".encode())
        os.close(file)
        return {"number": payload["number"]}

    return evaluate


def files(options: dict[str, Any]) -> Callable[[dict[str, Any], Report], dict[str, Any]]:
    """Jobs count up in a file below the run's folder, as trainings do in checkpoints."""
    folder = Path(options["folder"])
    word = (folder / "space/word.txt").read_text()

    def evaluate(payload: dict[str, Any], report: Report) -> dict[str, Any]:
        count = folder / payload["file"]
        begun = int(count.read_text()) if count.is_file() else 0
        for step in range(begun, payload["until"]):
            count.parent.mkdir(parents=True, exist_ok=True)
            count.write_text(str(step + 1))
            report({"step": step + 1})
            time.sleep(payload.get("seconds", 0.0))
        (folder / "big.bin").write_bytes(b"x" * 20_000_000)
        return {"begun": begun, "word": word, "folder": str(folder)}

    return evaluate
