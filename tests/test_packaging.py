"""What an installed peerd consists of: a real wheel, built from a copy of the tree and looked into."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("peerd", "overlay", "blocks", "routing", "cli", "netsim")
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel; built in a copy, since a build leaves things in its tree."""
    copy = tmp_path_factory.mktemp("tree")
    hidden = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*PACKAGES, "tests", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=hidden)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    built = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, check=True, capture_output=True, text=True)
    return zipfile.ZipFile(copy / "dist" / built.stdout.split()[-1])


def test_a_wheel_has_every_file_of_the_packages_and_no_tests_or_benchmarks(wheel: zipfile.ZipFile) -> None:
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in files} == set(PACKAGES)
    modules = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert {name for name in files if name.endswith(".py")} == modules
    model = {f"blocks/demo/{path.name}" for path in (ROOT / "blocks" / "demo").iterdir() if path.is_file()}
    assert model <= files


def test_a_wheel_brings_both_commands(wheel: zipfile.ZipFile) -> None:
    entries = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    lines = wheel.read(entries).decode().splitlines()
    assert lines == ["[console_scripts]", "peerctl = cli.peerctl:main", "peerd = cli.peerd:main"]
