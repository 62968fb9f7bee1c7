"""What the two ends of a run on several machines should have in common."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata

PACKAGES = ("sparse-nas", "torch")


def versions() -> dict[str, str]:
    """Of this package, of torch (without the name of its build) and of Python; nothing is imported."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[package] = "(not installed)"
    return found


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """What differs and may change results, in words; "" if nothing does. Any Python goes with any other."""
    return ", ".join(
        f"{package} {there[package]}, not {here[package]}"
        for package in PACKAGES
        if package in there and package in here and there[package] != here[package]
    )
