"""Two and more Ray nodes on one machine, each in a network namespace of its own and without the others' files.

A node has an address, a cable that can be cut, and (unless it is the first) empty folders where the first node has the run. Needs
root, `ip netns` and ray; `why_not()` says what is missing. Start with `Network`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

RAY_FOLDER = Path("/tmp/ray")
PORT = 6379


def why_not() -> str:
    """Why there can be no such network here; "" if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the program ip (package iproute2) is missing"
    name = f"nas-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=False)
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError:
        return "ray is not installed"
    return ""


class Node:
    """One machine of the network; made by `Network.add`.

    Args:
        network: where it is.
        number: from 1; the last part of its address.
        hidden: folders that are empty for it.
        small: a folder of its own that holds next to nothing, for its temporary files; None: the machine's.
    """

    def __init__(self, network: Network, number: int, hidden: Sequence[Path], small: Path | None = None) -> None:
        self.network, self.number, self.small = network, number, small
        self.name = f"{network.name}-{number}"
        self.address = f"{network.subnet}.{number}"
        self.hidden = tuple(hidden)
        self._process: subprocess.Popen[bytes] | None = None
        _ip("netns", "add", self.name)
        _ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _ip("link", "set", self.cable, "master", network.bridge, "up")
        _ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self.name, "link", "set", "eth0", "up")
        _ip("-n", self.name, "link", "set", "lo", "up")

    @property
    def cable(self) -> str:
        return f"nv{self.network.mark}{self.number}"

    def command(self, arguments: Sequence[str]) -> list[str]:
        """A command line that runs `arguments` on this node; with the folders that its Ray has, once that runs."""
        if self._process is not None and self._process.poll() is None:
            return ["nsenter", "--target", str(self._process.pid), "--mount", "--net", "--", *arguments]
        hide = "".join(f"mkdir -p {path}; mount -t tmpfs none {path}; " for path in self.hidden)
        if self.small is not None:
            hide += f"mkdir -p {self.small}; mount -t tmpfs -o size=16k none {self.small}; "
        return ["ip", "netns", "exec", self.name, "sh", "-c", hide + 'exec "$@"', "sh", *arguments]

    def environment(self, token: str | None = None) -> dict[str, str]:
        """For processes on this node."""
        own = {} if self.small is None else {"TMPDIR": str(self.small)}
        return (
            dict(os.environ)
            | own
            | {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": self.network.token if token is None else token,
                "RAY_USAGE_STATS_ENABLED": "0",
                "OMP_NUM_THREADS": "1",
            }
        )

    def start(self, head: Node | None = None, *, cpus: int = 1) -> None:
        """Start Ray: as the head, or joined to one. Returns when the node answers or has died.

        Raises:
            RuntimeError: Ray did not start; with what it printed.
        """
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={self.address}"]
        ray += [f"--num-cpus={cpus}", "--object-store-memory=200000000", "--disable-usage-stats"]
        ray += (
            ["--head", f"--port={PORT}", "--include-dashboard=false"]
            if head is None
            else [f"--address={head.ray_address}"]
        )
        log = self.network.folder / f"{self.name}.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                self.command(ray), env=self.environment(), stdout=output, stderr=output, start_new_session=True
            )
        until = time.monotonic() + 60
        while b"Ray runtime started" not in log.read_bytes():
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{self.name} did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.2)

    @property
    def ray_address(self) -> str:
        return f"{self.address}:{PORT}"

    def pids(self) -> list[int]:
        """All processes of the node."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        return [int(word) for word in found.stdout.split()]

    def kill(self) -> None:
        """Power off: every process gets SIGKILL."""
        for _ in range(20):
            pids = self.pids()
            if not pids:
                break
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        if self._process is not None:
            self._process.wait()

    def cut(self) -> None:
        """Pull the cable."""
        _ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        """Plug the cable in."""
        _ip("link", "set", self.cable, "up")

    def remove(self) -> None:
        """Kill it and take it out of the network."""
        self.kill()
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)


class Network:
    """Nodes on one bridge. Use it as a context: at the end everything is gone.

    Args:
        folder: for logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = os.getpid() % 100_000
        self.name = f"nas{self.mark}"
        self.subnet = f"10.{200 + self.mark % 50}.{self.mark // 50 % 250}"
        self.bridge = f"nb{self.mark}"
        self.token = secrets.token_hex(32)
        self.nodes: list[Node] = []

    def __enter__(self) -> Self:
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("link", "set", self.bridge, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.remove()
        subprocess.run(["ip", "link", "del", self.bridge], check=False, capture_output=True)

    def add(self, hidden: Sequence[Path] = (), small: Path | None = None) -> Node:
        """A new node, switched off. Nodes but the first have a Ray folder of their own. For the rest see `Node`."""
        number = len(self.nodes) + 1
        own = [RAY_FOLDER] if number > 1 else []
        self.nodes.append(Node(self, number, [*own, *hidden], small))
        return self.nodes[-1]


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
