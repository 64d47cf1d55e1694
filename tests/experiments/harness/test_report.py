"""The report: everything is in it, whatever it says is escaped, it loads nothing."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from rollax.experiments.harness.claims import Claim, judge
from rollax.experiments.harness.figures import Coordinates, HeatMap, Panel
from rollax.experiments.harness.report import (
    FRAMES,
    Episode,
    Section,
    Table,
    basis,
    cell,
    details,
    duration,
    fenced,
    interval_bar,
    markdown,
    provenance,
    shown_frames,
    verdict_lines,
    write_report,
)

RANDOM = np.random.default_rng(0)
ATTACK = """<img src=x onerror=alert(1)>&amp;"'</script><script>|`${x}"""
ARMS = [ATTACK, "_hidden", "$x^$", *(f"band_{i}/stale" for i in range(17))]
VALUES = np.array([0.1, 0.3, 0.2, 0.25, 0.15])  # t interval [0.102, 0.298]
TEXTS = [f"\n  |{'-' * i}<{i}>" for i in range(500)]
PICTURES = np.zeros((7, 24, 32, 3), np.uint8)
PICTURES[np.arange(7), :, np.arange(7)] = (213, 94, 0)


def judged(name="C1", statement="p < 0.2 & so on", says="above", bound=0.0, values=VALUES, unit="nats"):
    return judge(Claim(name, statement, lambda results: values, says, bound, unit), None)


def panels(arms):
    return [Panel(title, np.arange(1, 7), {arm: RANDOM.random((4, 6)) for arm in arms}) for title in ("reward", ATTACK)]


def sections():
    verdicts = [
        judged(),
        judged("C2", "equal", "within", 0.05),
        judged("C3", ATTACK, values=np.array([1.0]), unit=ATTACK),
        judged("C4", "no number", values=np.array([np.nan, 1.0])),
    ]
    table = Table(["arm", ATTACK], [[arm, cell(VALUES)] for arm in ARMS])
    episodes = [
        Episode(ATTACK, [f"{ATTACK}\nsecond line"], 1.0),
        Episode("long", TEXTS, 500.0),
        Episode("pictures", PICTURES, -0.5),
    ]
    maps = [
        HeatMap("late reward", ATTACK, "delta", [1, 2], [0.1], np.array([[0.5, 0.6]])),
        Coordinates(ATTACK, ["lr", "kind"], [[0.1, "a"], [0.2, ATTACK]], np.array([1.0, 2.0])),
    ]
    seconds, rates = {"compile": 14.2, "train and evaluate": 217.0}, {"updates/s": 3.1, "sampled tokens/s": 41234.5}
    return [
        Section("tabular", ATTACK, table, verdicts, panels(ARMS), ARMS[3:], episodes, seconds, rates, maps),
        Section("smol-1.7B", "the other", Table((), ()), [judged(says="below")], panels(ARMS[3:5])),
    ]


CONFIG = {"tabular": {"lr": 0.1, "arms": ("a", "b"), ATTACK: ATTACK}, "smol-1.7B": {"lr": 2e-4, "model": "smol"}}
VERSIONS = {
    "command": ["bandpo.py", "--name", "a b"],
    "started": "2026-11-20T10:31:05+00:00",
    "commit": "12e266812e266812e2668",
    "uncommitted": True,
    "devices": ["gpu:0", "gpu:1"],
    "device_kind": "H100",
    "python": "3.13.0",
    "libraries": {"optax": ATTACK},
}


class Page(HTMLParser):
    """Tags with their attributes, and the text of every element; void elements aside, tags must match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "input"):
            self.open.append((tag, dict(attrs), []))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)

    def handle_endtag(self, tag):
        opened, attrs, text = self.open.pop()
        assert tag == opened
        self.texts.append((tag, attrs, "".join(text)))

    def text(self, tag, kind=""):
        """Of the elements with this tag and class."""
        return [
            " ".join(text.split()) if tag != "pre" else text.removeprefix("\n")
            for name, attrs, text in self.texts
            if name == tag and kind in [*(attrs.get("class") or "").split(" "), ""]
        ]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    path = write_report(folder, f"A study {ATTACK}", sections(), config=CONFIG, versions=VERSIONS)
    text = path.read_text(encoding="utf-8")
    return SimpleNamespace(folder=folder, path=path, html=text, page=Page(text))


def test_files(written):
    figures = ("curves_tabular", "curves_smol-1.7B", "map_tabular_0", "map_tabular_1")
    expected = [f"{name}.{kind}" for name in figures for kind in ("png", "pdf")] + ["report.html", "report.md"]
    assert sorted(path.name for path in written.folder.iterdir()) == sorted(expected)
    assert written.path == written.folder / "report.html"
    assert len(written.html) < 2_000_000


def test_it_loads_nothing(written):
    for tag, attrs in written.page.tags:
        for name in ("src", "href", "xlink:href", "data", "action", "srcset"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), (tag, attrs)
    assert not re.search(r"https?:|@import|url\((?!#)", written.html)
    (policy,) = [attrs["content"] for tag, attrs in written.page.tags if attrs.get("http-equiv")]
    assert policy.startswith("default-src 'none'")


def test_links_and_ids(written):
    ids = [attrs["id"] for _, attrs in written.page.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    links = [attrs["href"][1:] for _, attrs in written.page.tags if (attrs.get("href") or "").startswith("#")]
    assert set(links) | set(re.findall(r"url\(#([^)]*)\)", written.html)) <= set(ids)


def test_what_users_wrote_is_text(written):
    page, plain = written.page, " ".join(ATTACK.split())
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert all(attrs["src"].startswith("data:image/webp") for tag, attrs in page.tags if tag == "img")
    assert page.text("h1") == [f"A study {plain}"]
    assert plain in page.text("h2")
    assert page.text("figcaption").count(plain) == 2  # of the second panel of each section
    assert any(plain in text for text in page.text("button"))
    assert any(f"C3{plain}" in text for text in page.text("div"))
    assert f"{ATTACK}\nsecond line" in page.text("pre")
    assert plain in page.text("td")  # the configuration
    assert f"optax {plain}" in page.text("td")
    assert plain in page.text("text")  # an axis of the heat map


def test_claims(written):
    page = written.page
    assert page.text("span", "badge")[:3] == ["✓ 1 holds", "✕ 2 fail", "? 2 inconclusive"]
    cells = page.text("div", "verdict")
    assert len(cells) == 5
    assert "✓ holds +0.200 [+0.102, +0.298]" in cells[0]
    assert "✕ fails" in cells[1]
    assert "tabular ? inconclusive +1.000, no interval" in cells[2]
    assert "some seeds gave no number" in cells[3]
    assert "asked > 0 nats" in page.text("span", "asked")
    assert sum(attrs.get("class", "").startswith("bar ") for _, attrs in page.tags) == 4  # none without a number


def test_one_claim_of_several_models_is_one_row(tmp_path):
    two = [Section(label, label, Table((), ()), [judged(values=v)], []) for label, v in (("a", VALUES), ("b", -VALUES))]
    page = Page(write_report(tmp_path, "t", two, config={}, versions={}).read_text())
    assert page.text("span", "name") == ["C1"]
    assert [text.split()[-5] for text in page.text("div", "effect")] == ["✓", "✕"]


def test_rivals_that_win_stand_on_top(tmp_path):
    """Those alone: a rival that fails is a claim like any other."""
    rival = lambda name, values: judge(Claim(name, ATTACK, lambda results: values, unit="nats", rival=True), None)  # noqa: E731
    verdicts = [judged(), rival("won", VALUES), rival("lost", -VALUES)]
    page = write_report(tmp_path, "t", [Section("a", "a", Table((), ()), verdicts, [])], config={}, versions={})
    (lines,) = (x for x in Page(page.read_text()).text("div", "rivals"))
    assert "a won:" in lines and "+0.200 [+0.102, +0.298] nats" in lines and "lost" not in lines
    text = (tmp_path / "report.md").read_text()
    assert text.index("- a won:") < text.index("## a") and "- a lost:" not in text
    plain = write_report(tmp_path, "t", [Section("a", "a", Table((), ()), [judged()], [])], config={}, versions={})
    assert not Page(plain.read_text()).text("div", "rivals")


def test_curves_table_and_throughput(written):
    page = written.page
    assert [" ".join(arm.split()) for arm in [*ARMS[3:], *ARMS[:3]]] == page.text("button")[1:21]
    chosen = {attrs["data-choose"] for tag, attrs in page.tags if "data-choose" in attrs}
    drawn = {attrs["data-arm"] for _, attrs in page.tags if "data-arm" in attrs}
    assert chosen == drawn == {str(i) for i in range(20)}
    assert sum(attrs.get("class") == "plot" for tag, attrs in page.tags if tag == "svg") == 2 * 2 + 2
    assert {" ".join(arm.split()) for arm in ARMS} <= set(page.text("th"))
    assert page.text("td").count("0.200 ± 0.098") == 20
    assert dict(zip(page.text("dt"), page.text("dd"), strict=True)) == {
        "started": "20 November 2026, 10:31 UTC",
        "commit": "12e266812e26 + uncommitted changes",
        "devices": "2 × H100",
        "python": "3.13.0",
        "compile": "14 s",
        "train and evaluate": "3 min 37 s",
        "updates/s": "3.1",
        "sampled tokens/s": "41,234",
    }
    assert page.text("code") == ["bandpo.py --name 'a b'"]


def test_episodes(written):
    page = written.page
    shown = shown_frames(len(TEXTS))
    assert page.text("pre")[1:] == [TEXTS[i] for i in shown]
    assert (len(shown), shown[0], shown[-1]) == (FRAMES, 0, 499)
    assert shown_frames(3) == [0, 1, 2]
    sliders = [attrs for tag, attrs in page.tags if tag == "input"]
    assert [(s["max"], s["data-last"]) for s in sliders] == [("199", "499"), ("6", "6")]
    assert sliders[0]["data-steps"].split() == [str(i) for i in shown]
    images = [attrs["src"].partition(",")[2] for tag, attrs in page.tags if tag == "img"]
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")) for image in images]
    np.testing.assert_array_equal(images, PICTURES)


def test_photographs_are_made_small(tmp_path):
    noise = RANDOM.integers(0, 256, (1, 600, 900, 3), np.uint8)
    section = Section("a", "a", Table((), ()), [], [], episodes=[Episode("noise", noise, 0.0)])
    page = Page(write_report(tmp_path, "t", [section], config={}, versions={}).read_text())
    ((_, image),) = [(tag, attrs["src"]) for tag, attrs in page.tags if tag == "img"]
    content = base64.b64decode(image.partition(",")[2])
    assert Image.open(io.BytesIO(content)).size == (480, 320)
    assert len(content) < noise.nbytes / 10


def test_configuration(written):
    rows = written.page.text("tr")
    assert "fieldtabularsmol-1.7B" in rows
    assert "lr0.10.0002" in rows
    assert "armsa, b" in rows
    assert "modelsmol" in rows


def test_markdown_report(written):
    text = (written.folder / "report.md").read_text()
    assert "![curves](curves_smol-1.7B.png)" in text
    assert "![late reward](map_tabular_0.png)" in text
    assert "| C1 | p < 0.2 & so on | holds | +0.200 [+0.102, +0.298] nats | > 0 |" in text
    assert "```text\nbandpo.py --name 'a b'\n```" in text
    outside = re.sub(r"(`{3,})text\n.*?\n\1", "", text, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<[A-Za-z/!?]", outside)
    for table in re.findall(r"(?:^\|.*\n?)+", outside, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_markdown_escapes():
    assert markdown(["a"], [["x|y\n<b> p < 0.2"]]) == "| a |\n| --- |\n| x\\|y \\<b> p < 0.2 |"
    assert fenced("a ``` b") == "````text\na ``` b\n````"


@pytest.mark.parametrize("says", ["above", "below", "within"])
@pytest.mark.parametrize("bound", [0.0, 0.05, 0.2, 0.5])
def test_bars_agree_with_verdicts(says, bound):
    verdict = judged(says=says, bound=bound)
    bar = interval_bar(verdict)
    (start, end), (low, high) = bar.claimed, bar.interval
    assert 0 <= start <= end <= 100
    assert 0 < low < bar.effect < high < 100
    inside, apart = start <= low and high <= end, high <= start or low >= end
    assert verdict.verdict == ("holds" if inside else "fails" if apart else "inconclusive")
    assert len(bar.bounds) == (2 if says == "within" else 1)


def test_bars_without_an_interval():
    one = interval_bar(judged(values=np.array([1.0])))
    assert one.interval is None
    assert 0 < one.effect < 100
    assert interval_bar(judged(values=np.array([np.nan, 1.0]))) is None
    point = interval_bar(judged(values=np.zeros(3)))
    assert point.interval == (50.0, 50.0)


def test_details_of_a_verdict():
    size, p = details(judged())
    assert size == f"effect size {judged().effect_size:.2f}"
    assert p == f"p = {stats.ttest_1samp(VALUES, 0.0, alternative='greater').pvalue:.3f}"
    known = replace(judged(), effect_size=np.inf, p_value=1e-5, p_adjusted=0.0213, correction="holm")
    assert details(known) == ["p < 0.001", "adjusted p = 0.021"]
    assert basis([known, known, judged()]) == "5 seeds, 95 % interval, adjusted by holm or 5 seeds, 95 % interval"
    assert details(judged(values=np.array([1.0]))) == []


def test_large_effects_have_fewer_digits():
    (line,) = verdict_lines([judged(values=np.array([490.0, 500.0]), unit="steps")])
    assert line[3] == "+495.0 [+431.5, +558.5] steps"


def test_durations():
    assert [duration(s) for s in (3.24, 46.6, 59.7, 217.0, 7500.0)] == [
        "3.2 s", "47 s", "1 min 00 s", "3 min 37 s", "2 h 05 min",
    ]  # fmt: skip


def test_little_is_known_of_a_run():
    assert provenance({}) == {}
    assert provenance({"commit": None, "uncommitted": True, "started": "yesterday", "devices": ["cpu"]}) == {
        "started": "yesterday",
        "devices": "cpu",
    }


GOOD = Section("a", "a", Table(["x"], [["1"]]), [], [])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([GOOD._replace(label="a/b")], "section.label.*'a/b'"),
        ([GOOD._replace(label=".a")], r"section.label.*'\.a'"),
        ([GOOD, GOOD], "section.label.*once.*'a'"),
        ([GOOD._replace(table=Table(["x"], [["1", "2"]]))], "table.lines: expected 1 cells in a, got 2"),
        ([GOOD._replace(episodes=[Episode("none", [], 0.0)])], "episode.frames.*'none'"),
        ([GOOD._replace(episodes=[Episode("e", np.zeros((2, 3, 3)), 0.0)])], r"uint8 \[T, H, W, 3\], got float64"),
    ],
)
def test_bad_input_leaves_the_report_as_it_was(tmp_path, bad, message):
    path = write_report(tmp_path, "the first", [GOOD], config={}, versions={})
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path, "the second", bad, config={}, versions={})
    assert Page(path.read_text()).text("h1") == ["the first"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_tables_for_people():
    values = np.array([0.1, 0.3, 0.2, 0.25, 0.15])  # t interval [0.102, 0.298]
    judged = judge(Claim("C1", "a claim", lambda r: values, "within", 0.5, "nats"), None)
    (line,) = verdict_lines([judged])
    assert line[0] == "C1"
    assert line[2] == "holds"
    assert line[3].startswith("+0.200 [+0.102, +0.298] nats")
    assert line[4] == "within ±0.5"
    assert cell(values) == "0.200 ± 0.098"
    assert cell(values[:1]) == "0.100"
    assert cell(np.array([1.0, np.nan])) == "-"
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
