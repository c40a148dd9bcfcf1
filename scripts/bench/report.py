"""What the measured moves come to: JSON for programs, a table for people."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from workload import Move

RATIOS = ("criu-stop-and-copy", "criu-lazy-pages")


def _both(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "worst": round(max(values), 3)}


def result(
    workload: str, system: str, moves: Sequence[Move], failures: Sequence[str], cannot: str | None = None
) -> dict[str, Any]:
    """One entry of "results". Without a single good move its figures are null; `cannot`: why none was tried."""
    entry: dict[str, Any] = {"workload": workload, "system": system, "moves": len(moves)}
    entry.update(dict.fromkeys(("client_gap_ms", "downtime_ms", "total_ms", "bytes_sent", "cpu_s")))
    if moves:
        names = [name for name in moves[0].parts]
        parts = {
            name: round(statistics.median([move.parts[name] for move in moves if name in move.parts]), 3)
            for name in names
        }
        entry["client_gap_ms"] = _both([move.gap_ms for move in moves])
        entry["downtime_ms"] = {**_both([move.downtime_ms for move in moves]), "parts": parts}
        entry["total_ms"] = _both([move.total_ms for move in moves])
        entry["bytes_sent"] = int(statistics.median([move.bytes_sent for move in moves]))
        entry["cpu_s"] = round(statistics.median([move.cpu_s for move in moves]), 3)
        entry["next_gap_ms"] = _both([move.second_gap_ms for move in moves])
        entry["each_gap_ms"] = [round(move.gap_ms, 3) for move in moves]
    entry["errors"] = sum(move.errors for move in moves)
    messages = [message for move in moves for message in move.messages]
    if messages:
        entry["messages"] = messages[:20]
    if failures:
        entry["failures"] = list(failures)
    if cannot:
        entry["cannot"] = cannot
    return entry


def _ratio(results: Sequence[dict[str, Any]], workload: str, system: str) -> float | None:
    gaps = {
        entry["system"]: entry["client_gap_ms"]["median"]
        for entry in results
        if entry["workload"] == workload and entry["client_gap_ms"]
    }
    if "godwit" not in gaps or not gaps.get(system):
        return None
    return gaps["godwit"] / gaps[system]


def ratios(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of the median gaps, for each workload."""
    found: dict[str, dict[str, float]] = {}
    for workload in dict.fromkeys(entry["workload"] for entry in results):
        for system in RATIOS:
            ratio = _ratio(results, workload, system)
            if ratio is not None:
                found.setdefault(workload, {})[f"godwit/{system}"] = round(ratio, 3)
    return found


def table(report: dict[str, Any]) -> str:
    """For a terminal."""
    head = ("WORKLOAD", "SYSTEM", "MOVES", "GAP ms", "worst", "DOWN ms", "worst", "TOTAL ms", "MiB", "CPU s", "ERRORS")
    rows: list[tuple[str, ...]] = [head]
    notes = []
    for entry in report["results"]:
        row = [entry["workload"], entry["system"], str(entry["moves"])]
        if entry["client_gap_ms"]:
            gap, down, total = entry["client_gap_ms"], entry["downtime_ms"], entry["total_ms"]
            row += [f"{gap['median']:.0f}", f"{gap['worst']:.0f}", f"{down['median']:.0f}", f"{down['worst']:.0f}"]
            row += [f"{total['median']:.0f}", f"{entry['bytes_sent'] / (1 << 20):.0f}", f"{entry['cpu_s']:.2f}"]
        else:
            row += ["-"] * 7
        rows.append((*row, str(entry["errors"])))
        if "cannot" in entry:
            notes.append(f"{entry['workload']}, {entry['system']}: not tried: {entry['cannot']}")
        for failure in entry.get("failures", []):
            notes.append(f"{entry['workload']}, {entry['system']}: failed: {failure}")
        for message in entry.get("messages", []):
            notes.append(f"{entry['workload']}, {entry['system']}: {message}")
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2])]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:])]
        lines.append("  ".join([*left, *right]))
    for workload, pairs in report["ratios"].items():
        lines += [f"{workload}: median gap {name} = {ratio:.2f}" for name, ratio in pairs.items()]
    for skipped in report["skipped"]:
        lines.append(f"{skipped['workload']}: skipped: {skipped['why']}")
    rate = report["link"].get("iperf3_bytes_per_s")
    if rate:
        lines.append(f"link: {rate / 1e6:.0f} MB/s by iperf3, one stream")
    return "\n".join(lines + notes)
