"""The nodes of a Ray cluster as an executor sees them: how many jobs there is room for, which to avoid, which share the run's disk.

Start with `Nodes`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray

from nas.executors.base import Placement
from nas.executors.versions import differences, versions

REFRESH_S = 1.0
"""How old the list of nodes may be."""
AVOID_S = 600.0
"""How long a node whose disk is full gets no jobs."""
NOTICE_S = 60.0
"""How long Ray may list a node that is dead."""
_MOST_ASKED_FOR = 1000


class Nodes:
    """What is known of the cluster's nodes.

    Args:
        placement: what a job occupies, how many may run, whom to tell.
    """

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._nodes: dict[str, Mapping[str, Any]] = {}
        self._read = -float("inf")
        self._avoided: dict[str, float] = {}
        self._dead: dict[str, float] = {}
        self._unshared: set[str] = set()
        self._told: set[str] = set()
        self._known = False
        self._told_no_room = False
        self._asks = bool(placement.address) and placement.workers > 0
        if self._asks:
            self._ask(min(placement.workers, _MOST_ASKED_FOR))

    @property
    def capacity(self) -> int:
        """Jobs that the nodes have room for, at most placement.workers if that is given; 1 where there is none, so that the job
        that waits makes the cluster grow if it can."""
        self._refresh()
        room = sum(self._room(node) for name, node in self._nodes.items() if name not in self._avoided)
        self._tell_no_room(room)
        return max(1, min(room, self._placement.workers) if self._placement.workers else room)

    @property
    def unshared(self) -> bool:
        """Whether some node does not see the run's folder."""
        return bool(self._unshared)

    @property
    def selector(self) -> dict[str, Any]:
        """Options of a task that keep it off the nodes to avoid."""
        self._refresh()
        if not self._avoided:
            return {}
        return {"label_selector": {"ray.io/node-id": f"!in({','.join(sorted(self._avoided))})"}}

    def name(self, node: str) -> str:
        """What a person calls a node."""
        found = self._nodes.get(node)
        if found is None:
            return f"node {node[:12]}" if node else "an unknown node"
        return f"{found['NodeManagerHostname']} ({found['NodeManagerAddress']}, {node[:8]})"

    def mark_unshared(self, node: str) -> None:
        """A node does not see the run's folder."""
        self._unshared.add(node)

    def seated(self, letter: Mapping[str, Any]) -> None:
        """A process of a node has introduced itself: {"node", "shared", "versions"}."""
        node = letter["node"]
        if not letter["shared"]:
            self.mark_unshared(node)
        torch = {"torch": letter["versions"].get("torch", "(not installed)")}
        differs = differences(torch, versions())
        if differs and node not in self._told:
            self._told.add(node)
            self._placement.message(
                f"{self.name(node)} has {differs}: its results may differ in the last digits, or its trials fail; "
                "install the same version on every node"
            )

    def died(self, node: str) -> None:
        """A node is gone, whatever Ray still lists."""
        self._dead[node] = time.monotonic() + NOTICE_S
        self._read = -float("inf")

    def avoid(self, node: str) -> bool:
        """Give a node no jobs for a while; returns False, and does not, if there is no other with room."""
        self._refresh()
        if not any(
            self._room(other) for name, other in self._nodes.items() if name != node and name not in self._avoided
        ):
            return False
        self._avoided[node] = time.monotonic() + AVOID_S
        return True

    def has_room(self) -> bool:
        """Whether a job could begin at once, as far as Ray knows."""
        free = ray.available_resources()
        needs = {"CPU": self._placement.cpus, "GPU": self._placement.gpus}
        return all(free.get(kind, 0.0) >= need for kind, need in needs.items())

    def close(self) -> None:
        """Let a cluster that grew for this run shrink."""
        if self._asks:
            self._ask(0)

    def _room(self, node: Mapping[str, Any]) -> int:
        needs = {"CPU": self._placement.cpus, "GPU": self._placement.gpus}
        has = node["Resources"]
        return min(int(has.get(kind, 0.0) / need + 1e-9) for kind, need in needs.items() if need > 0)

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._read < REFRESH_S:
            return
        self._read = now
        self._dead = {name: until for name, until in self._dead.items() if until > now}
        before = self._nodes
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in self._dead}
        if self._known and self._placement.address:
            for name in nodes.keys() - before.keys():
                self._nodes = nodes
                self._placement.message(
                    f"node {self.name(name)} has come, with room for {self._room(nodes[name])} trials"
                )
            self._nodes = before
            for name in before.keys() - nodes.keys():
                self._placement.message(f"node {self.name(name)} is gone")
        self._known, self._nodes = True, nodes
        self._avoided = {name: until for name, until in self._avoided.items() if until > now and name in nodes}
        if self._avoided and not any(self._room(node) for name, node in nodes.items() if name not in self._avoided):
            self._avoided = {}
        self._unshared &= nodes.keys()

    def _tell_no_room(self, room: int) -> None:
        if room or self._told_no_room:
            self._told_no_room = self._told_no_room and not room
            return
        self._told_no_room = True
        self._placement.message(
            f"no node of the cluster has room for a trial, which occupies {self._placement.cpus:g} CPUs and "
            f"{self._placement.gpus:g} GPUs (cpus_per_trial, gpus_per_trial): waiting for one that has"
        )

    def _ask(self, jobs: int) -> None:
        """Tell the autoscaler, if there is one, what shall be there."""
        from ray.autoscaler.sdk import request_resources

        bundle = {"CPU": self._placement.cpus, "GPU": self._placement.gpus}
        with suppress(Exception):  # a cluster without an autoscaler
            request_resources(bundles=[{kind: n for kind, n in bundle.items() if n > 0}] * jobs)
