"""Checkpoints of a search or a training: one file each, tensors and JSON together, a whole one left by a kill at any moment.

A checkpoint is a safetensors file; its JSON facts and a digest of everything stand in the file's own metadata, so both appear in
one rename. The one before is kept until the next is in place. Start with `Checkpoints`; `write_json` is for the small files beside.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nas.errors import RunError

FORMAT = 1
KEPT = 2
"""Generations that are kept."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: tensors by name, facts, and where it was read from."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    path: Path


class Checkpoints:
    """The checkpoints of one search, in a folder of its own.

    Args:
        folder: made when something is saved.
        identity: JSON that says what the search is (its options, its data ...); a checkpoint of another one is refused.
        of: what it is a checkpoint of, for messages: "search" or "training".
        network: what learns in it, for messages.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], *, of: str = "search", network: str = "supernet"
    ) -> None:
        self.folder = Path(folder)
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.of, self.network = of, network

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
        """Write a checkpoint beside the last one, and forget older ones.

        Raises:
            RunError: the folder cannot be written (full disk, no rights); the last checkpoint is as it was.
        """
        there = _numbered(self.folder)
        number = max(there, default=0) + 1
        plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        text = json.dumps({"format": FORMAT, "identity": self.identity, "facts": facts})
        content = save(plain, {"json": text, "digest": _digest(plain, text)})
        target = self.folder / f"checkpoint-{number:06d}.safetensors"
        write_bytes(target, content, f"a checkpoint of the {self.of}")
        for old in sorted(there)[: -(KEPT - 1)]:
            there[old].unlink(missing_ok=True)
        return target

    def load(self) -> Checkpoint | None:
        """The newest checkpoint; None if there is none.

        Raises:
            RunError: it is damaged, or of another search; says which file to remove.
        """
        there = _numbered(self.folder)
        if not there:
            return None
        path = there[max(there)]
        try:
            return self._checked(path)
        except _DamagedError as error:
            older = (
                f"remove it, and the {self.of} goes on from the one before"
                if len(there) > 1
                else f"remove the folder {self.folder}, and this {self.of} begins again"
            )
            raise RunError(f"{path}: {error}; {older}") from error

    def load_whole(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None if there is none.

        Newer ones that are damaged (by a full or failing disk: a kill leaves none) are set aside, under a name that begins with a
        dot, so the training goes on from the one before, or begins again: it loses time and nothing else.

        Raises:
            RunError: it is of another training or another version; or a damaged one cannot be renamed.
        """
        there = _numbered(self.folder)
        for number in sorted(there, reverse=True):
            path = there[number]
            try:
                return self._checked(path)
            except FileNotFoundError:
                continue
            except _DamagedError as damage:
                try:
                    path.rename(path.with_name(f".{path.name}.damaged"))
                except OSError as error:
                    raise RunError(f"{path}: {damage}; it cannot be set aside ({error.strerror}), remove it") from error
        return None

    def misfit(self, path: Path, error: Exception) -> RunError:
        """The error for a checkpoint whose tensors the search cannot take over."""
        return RunError(
            f"{path}: does not fit the {self.network} of this {self.of} ({error}); it was made by another version of the program "
            f"or the space. Go back to that, or remove the folder {self.folder} to begin this {self.of} again"
        )

    def _checked(self, path: Path) -> Checkpoint:
        tensors, content = _read(path)
        if content["format"] != FORMAT:
            raise RunError(
                f"{path}: a checkpoint of format {content['format']}, expected {FORMAT}: another version of this program made it; "
                f"use that version, or remove the folder {self.folder} to begin this {self.of} again"
            )
        self._check_identity(path, content["identity"])
        return Checkpoint(tensors, content["facts"], path)

    def _check_identity(self, path: Path, found: Mapping[str, Any]) -> None:
        for key in dict.fromkeys([*self.identity, *found]):
            if self.identity.get(key) != found.get(key):
                wanted, there = _differing(self.identity.get(key), found.get(key), key)
                raise RunError(
                    f"{path}: a checkpoint of another {self.of}: expected {wanted}, found {there}; put that back, or remove the "
                    f"folder {self.folder} to begin this {self.of} again"
                )


def read_newest(folder: Path) -> tuple[Checkpoint, dict[str, Any]] | None:
    """The newest whole checkpoint in somebody else's folder, with its identity; None if there is none. Changes nothing there."""
    there = _numbered(folder)
    for number in sorted(there, reverse=True):
        try:
            tensors, content = _read(there[number])
        except (_DamagedError, FileNotFoundError):  # its owner may be replacing it
            continue
        if content["format"] == FORMAT:
            return Checkpoint(tensors, content["facts"], there[number]), content["identity"]
    return None


def read_facts(folder: Path) -> dict[str, Any] | None:
    """The facts of the newest checkpoint in a folder, without its tensors and without judging them; None if there is none that can
    be read. For whoever looks on while a search runs."""
    paths = sorted(Path(folder).glob("checkpoint-*.safetensors"), reverse=True)
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["json"])["facts"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(facts, dict):
            return facts
    return None


def write_json(path: Path, value: Any, what: str) -> None:
    """Write a JSON file whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode(), what)


def write_bytes(path: Path, content: bytes, what: str) -> None:
    """Write a file whole or not at all, and have it on the disk before this returns.

    Raises:
        RunError: it cannot be written; says `what` was to be written.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise RunError(
            f"{path}: cannot write {what}: {error.strerror or error}; free some space or fix the rights, then start the same "
            "command again"
        ) from error


class _DamagedError(Exception):
    """A file that is no whole checkpoint; the text says so."""


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and {"format", "identity", "facts"} of a file.

    Raises:
        FileNotFoundError: it is gone.
        _DamagedError: it is no whole checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
        text = metadata["json"]
        if metadata["digest"] != _digest(tensors, text):
            raise ValueError("its content does not fit its digest")
        return tensors, json.loads(text)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing in its metadata" if isinstance(error, KeyError) else error
        raise _DamagedError(f"expected a checkpoint, found a damaged or foreign file ({reason})") from error


def _numbered(folder: Path) -> dict[int, Path]:
    found = {}
    for path in Path(folder).glob("checkpoint-*.safetensors"):
        number = path.name.removeprefix("checkpoint-").removesuffix(".safetensors")
        if number.isdecimal():
            found[int(number)] = path
    return found


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    total = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return total.hexdigest()


def _differing(one: Any, two: Any, key: str) -> tuple[str, str]:
    """The first place where two JSON values differ, as "key.key = value" each."""
    if isinstance(one, dict) and isinstance(two, dict):
        for name in dict.fromkeys([*one, *two]):
            if one.get(name) != two.get(name):
                return _differing(one.get(name), two.get(name), f"{key}.{name}")
    return f"{key} = {one!r}", f"{key} = {two!r}"
