"""House rules that a linter can't say: sizes, names, and purity of the pure files."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("peerd", "overlay", "blocks", "routing", "cli", "netsim")
LINES_AT_MOST = 600
BANNED_NAMES = {"utils", "helpers", "common", "manager", "base"}

PURE = (
    "overlay/varint.py",
    "overlay/protobuf.py",
    "overlay/multiaddr.py",
    "overlay/errors.py",
    "overlay/identity.py",
    "overlay/multistream.py",
    "overlay/upgrade.py",
    "overlay/identify.py",
    "overlay/gate.py",
    "overlay/address_book.py",
    "overlay/pacing.py",
    "overlay/noise",
    "overlay/yamux",
    "overlay/rpc/types.py",
    "overlay/rpc/frame.py",
    "overlay/rpc/codec.py",
    "overlay/rpc/signing.py",
    "overlay/dht/records.py",
    "overlay/dht/store.py",
    "routing",
    "blocks/protocol",
    "blocks/engine/kv_budget.py",
    "peerd/adapters/adapter.py",
    "peerd/adapters/directory.py",
    "peerd/training/settings.py",
    "peerd/training/dataset.py",
    "peerd/training/batches.py",
    "peerd/training/schedule.py",
    "peerd/training/gradients.py",
    "netsim/flow.py",
    "netsim/nat.py",
    "netsim/metrics.py",
    "netsim/tables.py",
    "netsim/scenario.py",
    "netsim/schedule.py",
    "netsim/paths.py",
    "netsim/outcome.py",
    "netsim/flow.py",
    "netsim/nat.py",
    "netsim/schedule.py",
    "netsim/metrics.py",
)
IMPURE_IMPORTS = {
    "asyncio",
    "socket",
    "ssl",
    "time",
    "random",
    "secrets",
    "select",
    "threading",
    "os",
    "subprocess",
}


def python_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_no_file_outgrows_a_reader() -> None:
    long = {str(path.relative_to(ROOT)): count for path in python_files()
            if (count := len(path.read_text(encoding="utf-8").splitlines())) > LINES_AT_MOST}  # fmt: skip
    assert long == {}


def test_no_module_is_named_after_nothing() -> None:
    assert [str(path) for path in python_files() if path.stem in BANNED_NAMES] == []


def test_pure_files_have_no_way_to_reach_the_world() -> None:
    wrong = []
    files = [
        found
        for place in PURE
        for found in (sorted((ROOT / place).rglob("*.py")) if (ROOT / place).is_dir() else [ROOT / place])
    ]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            wrong += [
                f"{path.relative_to(ROOT)} imports {name}" for name in names if name.split(".")[0] in IMPURE_IMPORTS
            ]
            if isinstance(node, ast.AsyncFunctionDef | ast.Await):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} is asynchronous")
    assert wrong == []


def test_every_module_says_what_it_owns() -> None:
    sources = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in python_files()}
    missing = [name for name, text in sources.items() if text.strip() and not ast.get_docstring(ast.parse(text))]
    assert missing == []
