"""What the machine is, and how much of it other processes took while something was measured."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts that a figure depends on."""

    cpu: str
    num_cores: int
    memory_gib: int
    features: tuple[str, ...]
    system: str

    @property
    def slug(self) -> str:
        """A name for a folder, such as `2-core-amd-epyc`."""
        words = re.sub(r"\([^)]*\)|@.*", " ", self.cpu).lower()
        short = re.findall(r"[a-z0-9]+", words)[:4]
        return f"{self.num_cores}-core-{'-'.join(short) or 'cpu'}"

    @property
    def dtype(self) -> str:
        """The faster dtype of a CPU: bfloat16 needs its own instructions to be worth it."""
        has_bf16 = {"avx512_bf16", "amx_bf16"} & set(self.features)
        return "bfloat16" if has_bf16 else "float32"


def describe() -> Machine:
    """Read the machine's description from the system."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    return Machine(
        cpu=model[1].strip() if model else platform.processor() or platform.machine(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30),
        features=tuple(feature for feature in _FEATURES if feature in present),
        system=f"{platform.system()}, Python {platform.python_version()}",
    )


class CpuWatch:
    """Cores used by everything but the given processes and their children, since it was made."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._roots = tuple(pids)
        self._since = time.perf_counter()
        self._busy = _busy_s()
        self._own = self._own_s()

    def other_cores(self) -> float:
        """Mean number of cores that unrelated processes kept busy; 0.2 and more spoils a figure."""
        wall = max(time.perf_counter() - self._since, 1e-6)
        others = (_busy_s() - self._busy) - (self._own_s() - self._own)
        return round(max(others / wall, 0.0), 2)

    def _own_s(self) -> float:
        total = 0.0
        seen: set[int] = set()
        for root in self._roots:
            process = psutil.Process(root)
            for member in (process, *process.children(recursive=True)):
                if member.pid in seen:
                    continue
                seen.add(member.pid)
                try:
                    times = member.cpu_times()
                except psutil.NoSuchProcess:  # a short-lived helper ended under way
                    continue
                total += times.user + times.system
        return total


def _busy_s() -> float:
    times = psutil.cpu_times()
    return times.user + times.system + times.nice + getattr(times, "steal", 0.0)
