"""The page in a real Chromium, about a server and a trace whose numbers are known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.illustrations.browser import PACKAGES, Browser, browser, is_installed
from tests.unit.cli.metrics_server import Server, recorded
from tests.unit.cli.planted_rounds import append, instant, rounds, write
from vllm_saguaro.cli.exposition import Snapshot
from vllm_saguaro.cli.history import History
from vllm_saguaro.cli.metrics_source import fetch, metrics_url
from vllm_saguaro.cli.reading import read
from vllm_saguaro.cli.trace_tail import TraceFile
from vllm_saguaro.cli.watch_page import PageServer, page_server
from vllm_saguaro.cli.wording import Row, rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed(), reason=f"no Chromium and driver here: apt-get install {PACKAGES}"),
]

BARS = """return [...document.querySelectorAll("#rounds g.bar")].map((bar) => ({
  name: bar.dataset.name, step: Number(bar.dataset.step),
  parts: [...bar.querySelectorAll("rect")].map((rect) => ({
    kind: rect.getAttribute("class"), left: Number(rect.getAttribute("x")), top: Number(rect.getAttribute("y")),
    width: Number(rect.getAttribute("width")) })),
}))"""
CONTRASTS = """
const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = (rgb) => { const [r, g, b] = rgb.match(/[\\d.]+/g).map(Number).map(channel);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const probe = document.body.appendChild(document.createElement("i"));
const of = (name) => { probe.style.color = `var(--${name})`; return light(getComputedStyle(probe).color); };
const found = arguments[0].map(([one, other]) => {
  const [low, high] = [of(one), of(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05); });
probe.remove();
return found"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        started.show_as(1280, 1400)
        yield started


@pytest.fixture
def served() -> Iterator[Server]:
    server = Server(recorded("first"), recorded("second"), None)
    yield server
    server.close()


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    write(tmp_path / "rounds.json", *rounds(6), instant("draft down", 2, 1e6 + 24e3))
    return tmp_path / "rounds.json"


@pytest.fixture
def page(served: Server, trace: Path) -> Iterator[PageServer]:
    """Its history has asked once."""
    history = History(metrics_url(served.url), fetch)
    history.ask()
    with page_server("127.0.0.1", 0, history, 0.5, TraceFile(trace)) as page:
        yield page


def opened(chromium: Browser, page: PageServer, rounds: bool = True) -> None:
    chromium.open("about:blank")  # the page before this one asks a server that has ended
    chromium.complaints()
    chromium.open(page.url)
    chromium.wait_for(lambda: chromium.texts("#numbers tbody tr") and (chromium.texts("#rounds svg") or not rounds))


def table(chromium: Browser) -> dict[str, list[str]]:
    found = chromium.run(
        "return [...document.querySelectorAll('#numbers tbody tr')]"
        ".map((row) => [row.dataset.key, ...[...row.cells].map((cell) => cell.textContent.trim())])"
    )
    return {key: cells for key, *cells in found}


def shown(row: Row) -> str:
    return f"{row.value} {row.more}".strip()


def test_the_numbers_are_those_of_the_terminal(chromium: Browser, page: PageServer) -> None:
    opened(chromium, page)
    from_start = read(Snapshot(recorded("first")))
    assert from_start.outcomes > 10, "the recording has something in it"
    assert table(chromium) == {row.key: [row.name, "-", shown(row)] for row in rows(from_start)}
    page.history.ask()
    chromium.wait_for(lambda: "last at" in chromium.texts("#state")[0])
    (moment,) = page.history.since(0, "")["moments"]
    reading = read(Snapshot(recorded("second")), Snapshot(recorded("first")), moment["readings"]["all"]["seconds"])
    now = {row.key: shown(row) for row in rows(reading)}
    assert {key: cells[1] for key, cells in table(chromium).items()} == now
    assert reading.hit_rate is not None
    assert reading.verify is not None
    assert chromium.texts("#tiles [data-key=hit_rate] .value") == [f"{reading.hit_rate:.1%}"]
    hits, not_predicted, late, absent = chromium.texts("#outcomes .legend li")
    assert hits == f"hits {reading.hit_rate:.1%}"
    assert late == f"late {reading.misses['late'] / reading.outcomes:.1%}"
    assert (not_predicted.split()[0], absent) == ("not", "absent 0.0%")
    assert chromium.texts("#times .legend li")[0] == f"verify {1e3 * reading.verify:.2f} ms"
    assert chromium.complaints() == []


def test_columns_are_as_high_as_the_shares(chromium: Browser, page: PageServer) -> None:
    page.history.ask()
    opened(chromium, page)
    reading = page.history.since(0, "")["moments"][0]["readings"]["all"]
    heights = chromium.run(
        "return [...document.querySelectorAll('#outcomes figure > svg rect, #outcomes > svg rect')]"
        ".map((rect) => Number(rect.getAttribute('height')))"
    )
    shares = [reading["hit_rate"], *(count / reading["outcomes"] for count in reading["misses"].values() if count)]
    assert [height / sum(heights) for height in heights] == pytest.approx(shares, abs=1e-3)
    columns = chromium.run(
        "return [...document.querySelectorAll('#positions > svg rect')].map((r) => Number(r.getAttribute('height')))"
    )
    first, *others = reading["accepted_by_position"]
    assert [height / columns[0] for height in columns[1:]] == pytest.approx([o / first for o in others], abs=1e-3)
    assert chromium.complaints() == []


def test_the_plots_move_with_new_readings(chromium: Browser) -> None:
    texts = [recorded("first"), *(recorded("second").replace("384.0", f"{384 + 10 * n}.0") for n in range(6))]
    served = Server(*texts)
    history = History(metrics_url(served.url), fetch)
    # Where the machine took its time between two readings the line is in pieces, and one point is a disc.
    points = (
        "const lines = [...document.querySelectorAll('#speed > svg path.blue')].map((p) => p.getAttribute('d'));"
        "return lines.join('L').split(/[ML]+/).filter(Boolean).length"
        " + document.querySelectorAll('#speed > svg circle.blue').length"
    )
    try:
        with page_server("127.0.0.1", 0, history, 0.5, None) as page:
            for _ in range(3):
                history.ask()
            opened(chromium, page, rounds=False)
            chromium.wait_for(lambda: chromium.run(points) == 2)
            history.ask()
            chromium.wait_for(lambda: chromium.run(points) == 3)
            newest = history.since(0, "")["moments"][-1]["readings"]["all"]["tokens_per_second"]
            assert chromium.texts("#speed .legend li")[0] == f"tokens {newest:.1f}"
            assert "--trace FILE" in chromium.wait_for(lambda: chromium.texts("#rounds-words"))[0]
            assert chromium.texts("#rounds svg") == []
            assert chromium.complaints() == []
    finally:
        served.close()


def test_c_has_a_plot_once_there_is_one(chromium: Browser) -> None:
    c = 'vllm:saguaro_sampling_c{engine="0",model_name="pair"} 0.5\n'
    served = Server(recorded("first"), recorded("second"), f"{recorded('second')}\n{c}")
    history = History(metrics_url(served.url), fetch)
    shown = "const plot = document.getElementById('chosen-c'); return plot.getBoundingClientRect().height > 0"
    fits = (
        "return [...document.querySelectorAll('.tile .value')]"
        ".every((value) => value.scrollWidth <= value.parentElement.clientWidth)"
    )
    try:
        with page_server("127.0.0.1", 0, history, 0.5, None) as page:
            history.ask()
            history.ask()
            opened(chromium, page, rounds=False)
            chromium.wait_for(lambda: "last at" in chromium.texts("#state")[0])
            assert not chromium.run(shown)
            history.ask()
            chromium.wait_for(lambda: chromium.run(shown))
            assert chromium.texts("#chosen-c .legend li") == ["C 0.5"]
            assert chromium.texts("#tiles [data-key=chosen] .value")[0].endswith(", C = 0.5")
            assert chromium.run(fits)
            assert chromium.complaints() == []
    finally:
        served.close()


def bars(chromium: Browser) -> dict[tuple[str, int], list[dict[str, Any]]]:
    return {(bar["name"], bar["step"]): bar["parts"] for bar in chromium.run(BARS)}


def test_bars_lie_where_the_trace_has_them_and_show_what_is_hidden(chromium: Browser, page: PageServer) -> None:
    opened(chromium, page)
    found = bars(chromium)
    assert set(found) == {(name, step) for name in ("verify", "round", "wait") for step in range(1, 7)}
    origin = found["verify", 1][0]["left"]
    scale = (found["verify", 6][0]["left"] - origin) / 50e3
    assert scale * 59e3 > 1000, "they fill the page"

    def where(part: dict[str, Any]) -> tuple[float, float]:
        return (part["left"] - origin) / scale, part["width"] / scale

    pixel = 1.01 / scale
    for step in range(1, 7):
        start = 1e4 * (step - 1)
        (verify,) = found["verify", step]
        drafting, hidden = found["round", step]
        assert where(verify) == pytest.approx((start, 8e3), abs=pixel)
        assert (verify["kind"], drafting["kind"], hidden["kind"]) == ("pass", "open-part", "hidden-part")
        third = step % 3 == 0
        assert where(drafting) == pytest.approx((start + 1e3, 8e3 if third else 6e3), abs=pixel)
        assert where(hidden) == pytest.approx((start + 1e3, 7e3 if third else 6e3), abs=pixel)
        assert drafting["top"] == hidden["top"] > verify["top"]
        assert where(found["wait", step][0]) == pytest.approx((start + 8e3, 1e3), abs=pixel)
    marks = chromium.run(
        "return [...document.querySelectorAll('#rounds g.outcome')].map((mark) => [Number(mark.dataset.step),"
        " Number(mark.dataset.hits), Number(mark.dataset.misses), mark.querySelectorAll('circle.blue').length,"
        " mark.querySelectorAll('path.violet').length])"
    )
    assert marks == [[step, *([0, 1, 0, 1] if step % 3 == 0 else [1, 0, 1, 0])] for step in range(1, 7)]
    assert "draft down" in chromium.texts("#rounds title")
    assert "6 target passes in 58.0 ms, 4 hits, 2 misses. 95% of 6 draft rounds" in chromium.texts("#rounds-words")[0]
    assert "6 target passes" in chromium.run("return document.querySelector('#rounds svg').ariaLabel")
    assert chromium.complaints() == []


def test_new_rounds_appear_unless_it_is_held_still(chromium: Browser, page: PageServer, trace: Path) -> None:
    opened(chromium, page)
    append(trace, *rounds(1, begin=1e6 + 6e4, first=7))
    chromium.wait_for(lambda: ("verify", 7) in bars(chromium))
    chromium.run("document.getElementById('hold').click()")
    append(trace, *rounds(1, begin=1e6 + 7e4, first=8))
    chromium.run("globalThis.before = performance.getEntriesByType('resource').length")
    chromium.wait_for(lambda: chromium.run("return performance.getEntriesByType('resource').length > before + 8"))
    assert ("verify", 8) not in bars(chromium)
    chromium.run("document.getElementById('hold').click()")
    chromium.wait_for(lambda: ("verify", 8) in bars(chromium))
    write(trace, *rounds(2, begin=1e9, first=100))
    chromium.wait_for(lambda: ("verify", 101) in bars(chromium))
    assert ("verify", 8) not in bars(chromium), "the file was begun anew"
    assert chromium.complaints() == []


def test_it_says_since_when_there_is_no_answer(chromium: Browser, page: PageServer) -> None:
    page.history.ask()
    opened(chromium, page)
    page.history.ask()
    chromium.wait_for(lambda: chromium.texts("#state")[0].startswith("no answer since "))
    assert "answers 503" in chromium.texts("#state")[0]
    assert chromium.texts("#tiles .value"), "what was read is still there"
    assert chromium.complaints() == []


def test_it_outlives_the_command(chromium: Browser, served: Server) -> None:
    history = History(metrics_url(served.url), fetch)
    history.ask()
    with page_server("127.0.0.1", 0, history, 0.5, None) as page:
        opened(chromium, page, rounds=False)
        port = page.server_port
    chromium.wait_for(lambda: chromium.texts("#state")[0].startswith("no answer from the watch command since "))
    history = History(metrics_url(served.url), fetch)
    history.ask()
    history.ask()
    with page_server("127.0.0.1", port, history, 0.5, None):
        chromium.wait_for(lambda: chromium.texts("#state")[0].startswith("no answer since "))
        assert "answers 503" in chromium.texts("#state")[0], "the new command's words"
    assert {each for each in chromium.complaints() if "net::ERR_CONNECTION_" not in each} == set()


def test_several_engines_can_be_looked_at_alone(chromium: Browser, trace: Path) -> None:
    other = recorded("second").replace('engine="0"', 'engine="1"')
    served = Server(recorded("first") + other)
    history = History(metrics_url(served.url), fetch)
    history.ask()
    try:
        with page_server("127.0.0.1", 0, history, 0.5, TraceFile(trace)) as page:
            opened(chromium, page)
            assert chromium.texts("#engine option") == ["all", "engine 0", "engine 1"]
            chromium.run(
                "const select = document.getElementById('engine'); select.value = 'engine 1';"
                "select.dispatchEvent(new Event('change'))"
            )
            expected = read(Snapshot(other))
            assert {key: cells[2] for key, cells in table(chromium).items()} == {
                row.key: shown(row) for row in rows(expected)
            }
    finally:
        served.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_can_be_read_in_light_and_dark(chromium: Browser, page: PageServer, dark: bool) -> None:
    chromium.show_as(1280, 1400, dark=dark)
    try:
        opened(chromium, page)
        ground = chromium.run("return getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(20, 24, 28)" if dark else "rgb(255, 255, 255)")
        words = [("ink", "ground"), ("quiet", "ground"), ("quiet", "raised"), ("bad", "ground")]
        words += [("pass-ink", "pass"), ("draft-ink", "draft")]
        assert min(chromium.run(CONTRASTS, words)) >= 4.5
        drawn = [(name, "ground") for name in ("blue", "orange", "violet", "teal", "grey", "draft")]
        assert min(chromium.run(CONTRASTS, drawn)) >= 3
    finally:
        chromium.show_as(1280, 1400)


def test_it_fits_a_phone(chromium: Browser, page: PageServer) -> None:
    chromium.show_as(390, 800)
    try:
        page.history.ask()
        opened(chromium, page)
        assert chromium.run("return document.scrollingElement.scrollWidth <= window.innerWidth")
        assert chromium.run("return window.innerWidth") == 390
        assert chromium.texts("#rounds svg"), "the timeline is there, too"
    finally:
        chromium.show_as(1280, 1400)
