"""What status and swarm look like, without a daemon."""

from __future__ import annotations

import io
from typing import Any

import pytest

from cli.status import drawn
from cli.status import lines as status_lines
from cli.swarm import Style, lines
from cli.terminal import Notices, shown
from peerd.client import BadAnswer

PLAIN = Style(False, "#", "+", ".", 80)


def model(blocks: int, *servers: tuple[str, str], unserved: list[str] | None = None) -> dict[str, Any]:
    listed = [{"peer": f"12D3KooWpeer{i:04d}", "span": span, "state": state} for i, (span, state) in enumerate(servers)]
    return {"id": "ab" * 32, "name": "m", "blocks": blocks, "servers": listed, "unserved": unserved or []}


def test_blocks_are_drawn_in_the_order_of_their_spans() -> None:
    drawing = list(lines({"models": [model(4, ("2:4", "online"), ("0:2", "joining"), ("1:3", "online"))]}, PLAIN))
    assert [line.split()[1:3] for line in drawing[1:4]] == [["0:2", "++.."], ["1:3", ".##."], ["2:4", "..##"]]
    assert drawing[4].split()[-1] == "-121"


def test_a_large_model_fits_the_terminal_and_shows_its_weakest_block() -> None:
    narrow = Style(False, "#", "+", ".", 20)
    drawing = list(lines({"models": [model(100, ("0:51", "online"), ("52:100", "online"))]}, narrow))
    coverage = drawing[-1].split()[-1]
    assert len(coverage) == 20
    assert coverage == "1" * 10 + "-" + "1" * 9  # block 51 is one of the five in the eleventh cell


def test_many_servers_of_a_block_are_a_plus() -> None:
    drawing = list(lines({"models": [model(1, *[("0:1", "online")] * 12)]}, PLAIN))
    assert drawing[-1].endswith(" +")


def test_an_empty_network_is_advice() -> None:
    assert "peerd start --model demo" in next(lines({"models": []}, PLAIN))


def test_names_from_the_network_can_t_move_the_cursor() -> None:
    evil = model(1) | {"name": "\x1b]0;pwned\x07m"}
    assert "\x1b" not in "".join(lines({"models": [evil]}, PLAIN))
    assert shown("a\x9b2Jb\rc\n\td") == "a2Jbc\n\td"


@pytest.mark.parametrize("document", [{}, {"models": [{}]}, {"models": [model(3, ("x", "online"))]}, {"models": 3}])
def test_an_answer_of_another_version_is_told(document: dict[str, Any]) -> None:
    with pytest.raises(BadAnswer, match="another version"):
        drawn(lines(document, PLAIN))
    with pytest.raises(BadAnswer, match="another version"):
        drawn(status_lines(document, False))


def test_loading_shows_how_far_it_is() -> None:
    status = {
        "peer_id": "p", "version": "1", "pid": 1, "state": "joining", "addresses": [], "sessions": [],
        "models": [{"name": "demo", "span": "0:4", "state": "joining", "progress": 0.42}],
    }  # fmt: skip
    assert "models     demo blocks 0:4, joining, 42 % loaded" in list(status_lines(status, False))


def test_notices_go_to_a_file_once_each() -> None:
    out = io.StringIO()
    notices = Notices(out)
    for sentence in ("waiting", "waiting", "", "replaying"):
        notices.show(sentence)
    notices.clear()
    assert out.getvalue() == "waiting\nreplaying\n"
