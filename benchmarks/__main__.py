"""``make bench``: every part in order, from one run on one machine. ``--only NAME`` runs one of them."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import engine_steps, footprint, ring_hops, swarm_steps

PARTS: dict[str, Callable[[], None]] = {
    "engine": engine_steps.main,
    "swarm": swarm_steps.main,
    "hops": ring_hops.main,
    "footprint": footprint.main,
}


def processor() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=sorted(PARTS), help="run this part alone")
    only = parser.parse_args().only
    print(
        f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, one torch thread"
    )
    for name, run in PARTS.items():
        if only in (None, name):
            started = time.monotonic()
            run()
            print(f"  ({name}: {time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    main()
