"""The workloads by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nginx import Nginx
from postgresql import PostgreSql
from program import Program, Tools
from redis import IdleConnections, Redis
from writer import Writer


@dataclass(frozen=True)
class Workload:
    """A program and what makes it this workload; `mib` of it is what --mib replaces."""

    name: str
    make: Callable[..., Program]
    settings: dict[str, Any]
    quick: bool = False

    def resized(self, mib: int | None) -> Workload:
        """The same with another size, where it has one."""
        if not mib or not self.settings.get("mib"):
            return self
        return replace(self, settings={**self.settings, "mib": mib})

    def program(self, tools: Tools) -> Program:
        return self.make(tools, **self.settings)


WORKLOADS = (
    Workload("redis-small-idle", Redis, {"mib": 0, "client_us": 50_000}, quick=True),
    Workload("redis-1gib-load", Redis, {"mib": 1024, "client_us": 500}, quick=True),
    Workload("redis-4gib-load", Redis, {"mib": 4096, "client_us": 500}, quick=True),
    Workload("postgres-1gib-pgbench", PostgreSql, {"mib": 1024}),
    Workload("postgres-small-volume", PostgreSql, {"mib": 128}),
    Workload("postgres-4gib-volume", PostgreSql, {"mib": 128, "volume_mib": 4096}),
    Workload("writer-1gib-200mbs", Writer, {"mib": 1024, "mb_per_second": 200, "client_us": 500}),
    Workload("nginx-midstream", Nginx, {"mib": 512, "seconds": 25.0}),
    Workload("idle-5000-connections", IdleConnections, {"connections": 5_000, "client_us": 1_000}),
)
