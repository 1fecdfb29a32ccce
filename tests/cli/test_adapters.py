"""`peerctl adapters` and `peerctl generate --adapter`, against a real socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cli.adapters import line, run
from overlay.rpc.types import Part
from peerd.adapters.adapter import ModelShape
from peerd.client import ApiError
from tests.cli.test_commands import TEXT, command
from tests.cli.test_commands import run as run_process
from tests.peerd.scripted import MODEL_ID, ScriptedNode, answering, says

SHAPE = ModelShape("demo", MODEL_ID, "none/float32/sdpa/1", 12, 4, 4, 2, 1024)


@pytest.fixture
def node(tmp_path: Path) -> ScriptedNode:
    return ScriptedNode(says(TEXT), adapters_directory=tmp_path / "adapters")


@pytest.fixture
def path(node: ScriptedNode, tmp_path: Path) -> Iterator[Path]:
    with answering(node, tmp_path / "run" / "s") as path:
        yield path


def keep(node: ScriptedNode, name: str) -> None:
    node.adapters.save_prompt(name, SHAPE, Part("x", "float32", (5, 4), np.ones((5, 4), np.float32).tobytes()), {})


def test_adapters_are_shown_a_line_each(node: ScriptedNode, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("peerctl adapters", ["--socket", str(path)]) == 0
    assert "There are no adapters; `peerctl train" in capsys.readouterr().out
    keep(node, "fox")
    (node.adapters_directory / "broken").mkdir()
    assert run("peerctl adapters", ["--socket", str(path)]) == 0
    broken, fox = capsys.readouterr().out.splitlines()
    assert broken.startswith("broken") and "unusable" in broken and "adapter_config.json" in broken
    assert fox.split() == ["fox", "prompt", "for", "demo,", "5", "positions,", "1", "KiB"]


def test_adapters_as_json_are_for_programs(node: ScriptedNode, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(node, "fox")
    assert run("peerctl adapters", ["--json", "--socket", str(path)]) == 0
    [fox] = json.loads(capsys.readouterr().out)["adapters"]
    assert (fox["name"], fox["kind"], fox["length"]) == ("fox", "prompt", 5)


def test_an_adapter_is_removed_by_its_name_once(
    node: ScriptedNode, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(node, "fox")
    assert run("peerctl adapters", ["remove", "fox", "--socket", str(path)]) == 0
    assert capsys.readouterr().out == "The adapter fox is removed.\n"
    assert not node.adapters.has("fox")
    for name in ("fox", "../run", "a b"):
        with pytest.raises(ApiError) as caught:
            run("peerctl adapters", ["remove", name, "--socket", str(path)])
        assert caught.value.exit_code == 82


@pytest.mark.parametrize("words", [["remove"], ["list", "fox"], ["delete", "fox"]])
def test_other_words_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("peerctl adapters", words)
    assert caught.value.code == 2


def test_generate_takes_an_adapter_by_its_name(node: ScriptedNode, path: Path) -> None:
    keep(node, "fox")
    done = run_process(command("peerctl", "generate", "--adapter", "fox", "Tell me a story."), path)
    assert (done.returncode, done.stdout) == (0, TEXT + "\n")
    assert node.decodes[0].request.prefix is not None
    unknown = run_process(command("peerctl", "generate", "--adapter", "cat", "Tell me a story."), path)
    assert (unknown.returncode, unknown.stdout) == (82, "")
    assert (
        unknown.stderr.strip()
        == "peerctl generate: There is no adapter 'cat'; `peerctl adapters` lists those there are."
    )


def test_names_and_reasons_can_t_drive_the_terminal() -> None:
    adapter = {"name": "a", "kind": None, "model": None, "length": None, "size_bytes": 5, "problem": "bad \x1b[31m"}
    assert "\x1b" not in line(adapter, colour=False)
