"""Resident memory of the process that asks (Linux only)."""

from __future__ import annotations

from pathlib import Path

__all__ = ["peak", "start_peak"]


def start_peak() -> float:
    """What is resident now, in MB; `peak` counts from here on."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> float:
    """The most that was resident since `start_peak`, in MB."""
    return _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:"))
