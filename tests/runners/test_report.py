"""runners/reporting/report.py: one file that needs no other, as a browser shows it."""

import base64
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest
from test_network_tables import BATCH, TIME
from test_records import RECORD

from runners import cli, records
from runners.reporting import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
COMMAND = "experiment=single 'run=<b>x</b> & y'"
FOUND = [
    replace(RECORD, command=COMMAND),
    BATCH,
    replace(TIME, failure="does not compile: <nothing>", metric="failed", mode="compiled", command="a"),
]


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A report of three records and the figures that are drawn of them."""
    monkeypatch.chdir(tmp_path)
    records.write(FOUND, Path("results/runs/a"))
    records.write([replace(BATCH, depth=254, value=4246.0)], Path("results/runs/b"))
    assert cli.main(["task=report"]) == 0
    return tmp_path / "results" / "report.html"


class Reader(HTMLParser):
    """Collects the addresses a page refers to, the text of its cells, and checks that its tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.cells: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert tag not in ("script", "link", "iframe", "object")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    return reader


def test_the_page_refers_to_nothing_outside_itself(page: Path) -> None:
    reader = read(page)
    assert reader.open == []
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in reader.addresses)
    assert not re.search(r"url\(|@import", page.read_text(encoding="utf-8"))


def test_ours_stand_beside_the_papers_and_what_was_said_is_not_markup(page: Path) -> None:
    cells = read(page).cells
    for text in ("6290 (predicted)", "2522", "5.49 ± 0.16", "does not compile", COMMAND, "1001 (4x)", RECORD.device):
        assert text in cells
    assert "<code>exact</code>" in page.read_text(encoding="utf-8")
    assert any(cell.startswith("does not compile: <nothing>") for cell in cells)


def test_every_figure_is_in_the_page_to_the_byte(page: Path) -> None:
    figures = sorted(page.parent.glob("figures/*.png"))
    assert figures
    inside = [address.partition(",")[2] for address in read(page).addresses if address.startswith("data:")]
    assert sorted(map(base64.b64decode, inside)) == sorted(figure.read_bytes() for figure in figures)


def test_before_anything_was_measured_the_page_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["task=report"]) == 0
    text = Path("results/report.html").read_text(encoding="utf-8")
    assert "Nothing has been measured yet: <code>blpa-run task=runtime</code>." in text
    assert "75.49 ± 9.09" in read(Path("results/report.html")).cells


def test_figures_of_tables_come_before_those_of_single_runs() -> None:
    names = ["cifar10-a.png", "times-a.png", "error-b.png", "batches-a.png", "error-a.png"]
    ordered = sorted(map(Path, names), key=report._order)
    assert [path.name for path in ordered] == [
        "error-a.png", "error-b.png", "batches-a.png", "times-a.png", "cifar10-a.png",
    ]  # fmt: skip


def browse(page: Path, profile: Path, *arguments: str) -> str:
    """Open a page in the browser, which has no network to go to."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
        f"--user-data-dir={profile}", *arguments, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


LOOK = """<script>addEventListener("load", () => {
  const images = [...document.images], seen = images.filter(image => image.complete && image.naturalWidth > 100);
  const tables = [...document.querySelectorAll("table.results")];
  document.body.dataset.seen = JSON.stringify({
    images: images.length, drawn: seen.length, tables: tables.length,
    scrolls: document.documentElement.scrollWidth > innerWidth,
  });
});</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: Debian's package chromium has it")
@pytest.mark.parametrize("width", [1100, 400])
def test_a_browser_shows_every_table_and_figure(page: Path, tmp_path: Path, width: int) -> None:
    """At a desk's width and at a telephone's: pictures are decoded, and the page itself does not scroll sideways."""
    watched = page.with_name("watched.html")
    watched.write_text(page.read_text(encoding="utf-8").replace("</body>", LOOK), encoding="utf-8")
    shown = browse(watched, tmp_path / "profile", f"--window-size={width},2000", "--dump-dom")
    (seen,) = re.findall(r'data-seen="(.*?)"', shown)
    figures = len(list(page.parent.glob("figures/*.png")))
    assert f"&quot;images&quot;:{figures},&quot;drawn&quot;:{figures}," in seen
    tables = page.read_text(encoding="utf-8").count('<table class="results">')
    assert f"&quot;tables&quot;:{tables}," in seen
    assert "&quot;scrolls&quot;:false" in seen
    picture = tmp_path / "page.png"
    browse(page, tmp_path / "profile", f"--window-size={width},2000", f"--screenshot={picture}")
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[:2] == (2000, width)
    dark = (pixels[..., :3].mean(axis=2) < 0.5).mean(axis=1)
    assert (dark[:1000] > 0).mean() > 0.2  # lines of text all the way down
