"""Figures: what is drawn, files fit for a paper, SVG fit for a page."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from rollax.experiments.harness.figures import (
    INK,
    POINTS,
    Coordinates,
    HeatMap,
    Panel,
    draw_coordinates,
    draw_heat_map,
    draw_map,
    draw_panel,
    draw_panels,
    interval,
    looks,
    save,
    save_panels,
    scale,
    svg,
)

RANDOM = np.random.default_rng(0)
ODD = ["<b>a & b</b>", "$x^$", "_hidden", *(f"arm{i}/stale" for i in range(17))]
PANEL = Panel("reward", np.arange(1, 9), {arm: RANDOM.random((4, 8)) for arm in ODD})
HEAT = HeatMap(
    "late <reward>", "lr & more", "$delta", [1e-5, 0.1, 1.0], [0.01, "none"], [[1.0, 2.0, 3.0], [4.0, np.nan, 6.0]]
)
RUNS = Coordinates("reward", ["lr", "kind"], [[1e-4, "kl"], [1e-3, "tv"], [1e-2, "kl"]], np.array([0.5, np.nan, 0.1]))


def test_arms_keep_their_looks():
    some = looks([Panel("", np.arange(2), {"b": np.zeros((1, 2)), "c": np.zeros((1, 2))})], order=["a", "b"])
    assert list(some) == ["a", "b", "c"]
    assert some["b"] == looks([], order=["a", "b"])["b"]
    assert len(set(looks([], order=[f"arm{i}" for i in range(24)]).values())) == 24


def test_curves_are_means_and_intervals():
    x, values = np.arange(1000), RANDOM.random((5, 1000))
    (axis,) = draw_panel(Panel("", x, {"a": values}), looks([], ["a"])).axes
    (line,), (band,) = axis.lines, axis.collections
    shown = line.get_xdata()
    assert len(shown) == POINTS
    assert (shown[0], shown[-1]) == (0, 999)
    mean, half = interval(values)
    np.testing.assert_allclose(line.get_ydata(), mean[shown])
    corners = band.get_paths()[0].vertices
    for edge, expected in ((corners[:, 1].max(), mean + half), (corners[:, 1].min(), mean - half)):
        assert edge in expected[shown] or np.isclose(edge, expected[shown]).any()
    one = draw_panel(Panel("", np.array([3]), {"a": np.ones((1, 1))}), looks([], ["a"])).axes[0]
    assert one.lines[0].get_marker() == "o"  # a line through one point is invisible


def test_a_page_of_panels_names_every_arm_once():
    figure = draw_panels([PANEL] * 4, order=ODD[3:])
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == [*ODD[3:], *ODD[:3]]
    assert [axis.get_visible() for axis in figure.axes] == [True] * 4 + [False] * 2


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: draw_panels([]), "panels: expected at least one"),
        (lambda: draw_panels([Panel("t", np.arange(3), {"a": np.zeros((2, 4))})]), r"panel.curves\['a'\].*3.*\[2, 4\]"),
        (lambda: draw_panels([Panel("t", np.arange(0), {})]), r"panel.x.*\(0,\) in 't'"),
        (lambda: draw_heat_map(HEAT._replace(x=[1, 2])), r"heat_map.values.*\[2, 2\].*\[2, 3\]"),
        (lambda: draw_coordinates(RUNS._replace(values=np.zeros(2))), r"coordinates.points.*\[2, 2\].*3 rows"),
        (lambda: draw_coordinates(RUNS._replace(names=["lr"])), r"coordinates.points.*\[3, 1\].*one of 2"),
    ],
)
def test_wrong_shapes_are_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_heat_map_writes_every_number():
    axis, _ = draw_heat_map(HEAT).axes
    written = {tuple(text.get_position()): text.get_text() for text in axis.texts}
    assert written == {
        (0.5, 0.5): "1.00",
        (1.5, 0.5): "2.00",
        (2.5, 0.5): "3.00",
        (0.5, 1.5): "4.00",
        (2.5, 1.5): "6.00",
    }
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1e-5", "0.1", "1"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0.01", "none"]
    large = draw_heat_map(HEAT._replace(x=range(40), y=range(30), values=RANDOM.random((30, 40)))).axes[0]
    assert not large.texts
    assert len(large.get_xticklabels()) <= 14
    empty = draw_heat_map(HEAT._replace(values=np.full((2, 3), np.nan)))
    assert not empty.axes[0].texts


def test_scales():
    heights, ticks, log = scale([1e-4, 1e-2, 1e-3])
    np.testing.assert_allclose(heights, [0, 1, 0.5])
    assert log
    assert {text: round(at, 6) for at, text in ticks} == {"0.0001": 0.0, "0.01": 1.0, "0.001": 0.5}
    assert not scale([1e-4, 1e-2, 1e-3], may_be_log=False).log
    linear = scale(np.arange(1.0, 64.0))
    assert not linear.log
    np.testing.assert_allclose(linear.heights, np.arange(63) / 62)
    assert [text for _, text in linear.ticks] == ["1", "63", "20", "40"]
    names = scale(["kl", "tv", "kl", "chi2"])
    assert names.heights.tolist() == [0.0, 0.5, 0.0, 1.0]
    assert names.ticks == [(0.0, "kl"), (0.5, "tv"), (1.0, "chi2")]
    assert scale([True, False]).ticks == [(0.0, "True"), (1.0, "False")]
    assert scale([3, 3])[1:] == ([(0.5, "3")], False)
    assert scale([np.nan, np.nan]).ticks == []


def test_coordinates_show_the_best_on_top():
    axis = draw_coordinates(RUNS).axes[0]
    runs = [line.get_ydata() for line in axis.lines[:3]]
    assert np.isnan(runs[0][-1])
    np.testing.assert_allclose(runs[1:], [[1, 0, 0], [0, 0, 1]], atol=1e-12)
    said = [text.get_text() for text in axis.texts]
    assert {"lr\n(log)", "kind", "reward", "kl", "tv", "0.0001"} <= set(said)


def test_files_for_a_paper(tmp_path):
    save_panels(tmp_path / "curves_a.b.png", [PANEL])
    save(draw_map(HEAT), tmp_path / "map.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curves_a.b.pdf",
        "curves_a.b.png",
        "map.pdf",
        "map.png",
    ]
    assert (tmp_path / "curves_a.b.png").read_bytes().startswith(b"\x89PNG")
    content = (tmp_path / "curves_a.b.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert b"/FontFile2" in content  # TrueType, embedded
    assert b"/Type3" not in content
    save_panels(tmp_path / "again.png", [PANEL])
    assert (tmp_path / "again.pdf").read_bytes() == content
    with pytest.raises(ValueError, match=r"path.*\.png.*curves\.pdf"):
        save_panels(tmp_path / "curves.pdf", [PANEL])


@pytest.fixture(scope="module")
def inline():
    """Four figures as they stand together on a page, two of them equal."""
    figures = [draw_panel(PANEL, looks([PANEL])), draw_panel(PANEL, looks([PANEL])), draw_map(HEAT), draw_map(RUNS)]
    return [svg(figure, f"f{i}") for i, figure in enumerate(figures)]


def test_svgs_share_a_page(inline):
    ids = [re.findall(r'\bid="([^"]*)"', text) for text in inline]
    everything = [name for names in ids for name in names]
    assert everything
    assert len(set(everything)) == len(everything)
    for text, names in zip(inline, ids, strict=True):
        used = re.findall(r"url\(#([^)]*)\)", text) + re.findall(r'href="#([^"]*)"', text)
        assert set(used) == set(names)


def test_svgs_take_the_look_of_the_page(inline):
    for text in inline:
        assert not re.search(r"<style|<metadata|http|font-family|xmlns", text)
        assert INK not in text
        assert "currentColor" in text
    assert "var(--page)" in inline[3]


def test_svgs_hold_escaped_text_and_arms(inline):
    roots = [ElementTree.fromstring(text) for text in inline]
    said = [[element.text for element in root.iter("text")] for root in roots]
    assert {"late <reward>", "lr & more", "$delta"} <= set(said[2])
    assert "<reward>" not in inline[2]
    marked = [element.attrib["data-arm"] for element in roots[0].iter() if "data-arm" in element.attrib]
    assert sorted(marked, key=int) == [str(i) for i in range(20) for _ in ("line", "band")]
