"""The arrows of docs/design.md, enforced: who may import whom, and where torch stays unloaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("cli", "peerd", "blocks", "routing", "overlay", "netsim")

ALLOWED = {
    "cli": {"cli", "peerd.client", "peerd.config", "peerd.version", "peerd.exit_codes"},
    "peerd.client": {"peerd.client", "peerd.version", "peerd.exit_codes"},
    "peerd.client.torch": {"peerd.client", "blocks.model"},
    "peerd": {"peerd", "blocks", "routing", "overlay"},
    "blocks": {"blocks", "routing.types", "overlay"},
    "blocks.protocol": {
        "blocks.protocol",
        "blocks.sampling_params",
        "overlay.rpc.types",
        "overlay.errors",
        "routing.types",
    },
    "routing": {"routing", "overlay.errors"},
    "routing.types": set(),
    "overlay": {"overlay"},
    "netsim": set(OURS) - {"cli"},
    "netsim.loop": {"netsim.ordered"},
    "netsim.flow": {"netsim.flow"},
    "netsim.nat": set(),
    "netsim.metrics": set(),
    "netsim.trace": set(),
    "netsim.tables": set(),
    "netsim.scenario": {"netsim.nat", "netsim.tables"},
    "netsim.schedule": {"netsim.scenario"},
    "netsim.paths": {"netsim.scenario"},
    "netsim.outcome": {"netsim.metrics"},
    "netsim.report": {"netsim.metrics", "netsim.outcome"},
    "netsim.fabric": {
        "netsim.connection",
        "netsim.flow",
        "netsim.handshake",
        "netsim.loop",
        "netsim.nat",
        "netsim.wire",
        "overlay",
    },
    "netsim.world": {
        "netsim.fabric",
        "netsim.loop",
        "netsim.nat",
        "netsim.peers",
        "netsim.ports",
        "netsim.sim_host",
        "netsim.trace",
    },
}
"""Longest matching prefix decides; the reason for each row is in docs/design.md, section 1."""

NO_TORCH = (
    "blocks.protocol",
    "blocks.service",
    "blocks.text",
    "routing",
    "overlay",
    "peerd.node",
    "peerd.client",
    "cli",
)
TORCH_HOMES = (
    "blocks.model",
    "blocks.engine",
    "blocks.demo_train",
    "blocks.demo_training",
    "peerd.client.torch",
)


def modules() -> Iterator[tuple[str, Path]]:
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_import_points_down() -> None:
    wrong = []
    for name, path in modules():
        row = max((prefix for prefix in ALLOWED if within(name, prefix)), key=len)
        for imported in imports_of(path):
            if imported.split(".")[0] not in OURS:
                continue
            if not any(within(imported, allowed) for allowed in ALLOWED[row]):
                wrong.append(f"{name} imports {imported} (allowed: {sorted(ALLOWED[row])})")
    assert wrong == []


def test_only_the_model_and_the_engine_import_torch() -> None:
    wrong = [
        name
        for name, path in modules()
        if not any(within(name, home) for home in TORCH_HOMES)
        and any(within(imported, heavy) for imported in imports_of(path) for heavy in ("torch", "transformers"))
    ]
    assert wrong == []


def test_nothing_unpickles_or_trusts_remote_code() -> None:
    wrong = []
    for name, path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(within(imported, "pickle") for imported in imports_of(path)):
            wrong.append(f"{name} imports pickle")
        for node in ast.walk(tree):
            named = isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
            if named and not (isinstance(node.value, ast.Constant) and node.value.value is False):
                wrong.append(f"{name}:{node.value.lineno} trusts remote code")
    assert wrong == []


@pytest.mark.parametrize("name", NO_TORCH)
def test_importing_it_leaves_torch_unloaded(name: str) -> None:
    script = (
        "import importlib, pkgutil, sys\n"
        "def load(name):\n"
        "    module = importlib.import_module(name)\n"
        "    for found in pkgutil.iter_modules(getattr(module, '__path__', []), name + '.'):\n"
        "        if found.name != 'peerd.client.torch' and not found.name.endswith('__main__'):\n"
        "            load(found.name)\n"
        f"load({name!r})\n"
        "heavy = [m for m in ('torch', 'transformers', 'bitsandbytes') if m in sys.modules]\n"
        "sys.exit(f'{heavy} loaded' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
