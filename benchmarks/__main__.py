"""Every part in order, each printing its own table: ``python -m benchmarks [--only NAME]``."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

PARTS = {
    "engine": "benchmarks.engine_steps",
    "hops": "benchmarks.ring_hops",
    "swarm": "benchmarks.swarm_steps",
    "training": "benchmarks.training_steps",
    "footprint": "benchmarks.footprint",
}
ON_REQUEST = {"streams": "benchmarks.overlay_streams", "beside": "benchmarks.tokens_beside_batches"}


def processor() -> str:
    """The CPU's name, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def main() -> int:
    """Print the machine, then the parts asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks", description="Speed of this checkout, each ratio from one run.")
    parser.add_argument("--only", choices=[*PARTS, *ON_REQUEST], help="one part alone")
    only = parser.parse_args().only
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{cores} cores of {processor()}, Python {platform.python_version()}, torch {version('torch')}")
    started = time.perf_counter()
    for name, module in (PARTS | ON_REQUEST).items():
        if name == only or (only is None and name in PARTS):
            print(f"\n== {name} (load {os.getloadavg()[0]:.1f})", flush=True)
            importlib.import_module(module).main()
            sys.stdout.flush()
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
