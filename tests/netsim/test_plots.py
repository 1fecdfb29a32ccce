from __future__ import annotations

from pathlib import Path

import pytest

from netsim.metrics import Series
from netsim.outcome import Outcome

plots = pytest.importorskip("netsim.plots", reason="needs the extra `plots`")

MEANINGS = {"coverage.*": "servers of a block", "lookup_s": "seconds of a lookup", "tokens_per_s": "over all drivers"}


def drawn(directory: Path, series: dict[str, Series], observations: dict[str, tuple[float, ...]]) -> dict[str, bytes]:
    outcome = Outcome(
        "x",
        "x.toml",
        1,
        {},
        (),
        (),
        {},
        "aa",
        1,
        1,
        60.0,
        1.0,
        1.0,
        series,
        observations,
        ((30.0, "kill"), (40.0, "heal")),
    )
    return {file.name: file.read_bytes() for file in plots.draw(outcome, MEANINGS, directory / "made")}


def test_a_family_of_series_is_one_map_and_others_are_pictures_of_their_own(tmp_path: Path) -> None:
    times = tuple(float(second) for second in range(60))
    rows = {f"coverage.{block}": Series(times, tuple(float(second % 7) for second in range(60))) for block in range(40)}
    rows["tokens_per_s"] = Series(times, tuple(second / 7 for second in range(60)))
    rows["window_s"] = Series((1.0, 1.1, 50.0), (0.01, 5.0, 0.02))
    files = drawn(tmp_path, rows, {})
    assert sorted(files) == ["x-seed1-coverage.png", "x-seed1-tokens_per_s.png", "x-seed1-window_s.png"]
    assert all(data.startswith(b"\x89PNG") for data in files.values())


def test_a_long_title_stays_within_the_picture_beside_long_labels() -> None:
    outcome = Outcome("x", "x.toml", 1, {}, (), (), {}, "aa", 1, 1, 60.0, 1.0, 1.0)
    figure, axes = plots._canvas(
        outcome, "recovery_s: seconds of the longest pause after a strike on a hop of a live route"
    )
    axes.set_yticks([0.5], ["p50 0.0737, max 3.33 and more"])
    figure.canvas.draw()
    (shown,) = (found for found in (axes.title, axes._left_title) if found.get_text())
    assert shown.get_text().count("\n") == 1
    assert shown.get_window_extent().x1 <= figure.bbox.x1
    plots.plt.close(figure)


def test_a_family_of_observations_is_one_picture_and_nothing_observed_is_none(tmp_path: Path) -> None:
    files = drawn(
        tmp_path,
        {},
        {
            "lookup_s": (0.1, 0.2, 300.0),
            "recovery_s": (1.0, 2.0),
            "recovery_s.kill": (1.0,),
            "recovery_s.freeze": (2.0,),
            "never_s": (),
        },
    )
    assert sorted(files) == ["x-seed1-lookup_s.png", "x-seed1-recovery_s.png"]


def test_series_of_one_point_or_of_zeros_are_drawn_too(tmp_path: Path) -> None:
    point, zeros = Series((1.0,), (3.0,)), Series((1.0, 2.0), (0.0, 0.0))
    assert len(drawn(tmp_path, {"a": point, "b": zeros, "coverage.0": point}, {"c_s": (0.0, 0.0)})) == 4
