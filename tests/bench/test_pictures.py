"""The plot and the page."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from shmengine.bench import plot
from shmengine.bench.page import page
from shmengine.bench.plan import MIB
from tests.bench.conftest import made_up

SVG = "{http://www.w3.org/2000/svg}"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)


@pytest.fixture
def wide(report):
    """All that can be in a plot."""
    rows = list(report.rows)
    for number, name in enumerate(("kickmsg", "kickmsg (spinning)", "iceoryx2", "pyzmq", "faster-fifo")):
        rows += [made_up(name, size, 1000 + number, 10 + number, group="rival") for size in (64, MIB)]
    return dataclasses.replace(report, rows=rows)


def test_a_png_shows_something(wide, tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "plot.png"
    plot.save(wide, path)
    image = imread(path)
    assert image.shape[:2] == (864, 1800)
    assert path.read_bytes().startswith(b"\x89PNG")
    for name, style in plot.STYLES.items():
        drawn = name in {row.name for row in wide.rows}
        wanted = [int(style.colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        pixels = int((np.abs(image[..., :3] - wanted).max(axis=2) < 0.01).sum())
        assert (pixels > 200) == drawn or style.colour == plot.STYLES["shm"].colour, (name, pixels)


def test_an_svg_is_one_with_all_lines_named(wide, tmp_path, monkeypatch):
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")
    path = tmp_path / "plot.svg"
    plot.save(wide, path)
    texts = {"".join(each.itertext()).strip() for each in ET.parse(path).iter(f"{SVG}text")}
    assert {"shm", "shm, in place", "pipe", "socket", "kickmsg", "iceoryx2", "pyzmq"} <= texts
    assert "kickmsg (spinning)" not in texts, "one line a rival"


def test_a_plot_of_nothing(report, tmp_path):
    plot.save(dataclasses.replace(report, rows=[]), tmp_path / "plot.png")
    plot.save(dataclasses.replace(report, rows=report.rows[-1:]), tmp_path / "plot.png")


@pytest.mark.parametrize(
    "wanted",
    [
        [],
        [0.5],
        [0.1, 0.9],
        [0.5, 0.5, 0.5],
        [0.0, 0.01, 0.02, 0.5, 0.51, 0.99, 1.0],
        [0.1 * n for n in range(11)],
    ],
)
def test_labels_are_apart_and_near_where_they_belong(wanted):
    places = plot._apart(wanted)
    assert len(places) == len(wanted)
    assert all(b - a >= plot.LABEL_GAP - 1e-9 for a, b in itertools.pairwise(places))
    assert all(abs(a - b) <= plot.LABEL_GAP * len(wanted) for a, b in zip(places, wanted, strict=True))


def test_colours_and_markers_differ():
    assert len({(style.colour, style.dashes) for style in plot.STYLES.values()}) == len(plot.STYLES)
    assert len({style.marker for style in plot.STYLES.values()}) == len(plot.STYLES)


# --- the page -------------------------------------------------------------------------------------


def test_a_page_loads_nothing_and_escapes_what_it_shows(wide):
    text = page(wide, with_plot=True)
    assert not re.search(r"https?://|//cdn|<link|@import|url\(", text)
    assert "&lt;rival&gt;" in text
    assert "<rival>" not in text
    assert "made up &amp; &lt;fast&gt;" in text
    picture = re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert ET.parse(io.BytesIO(base64.b64decode(picture.group(1)))).getroot().tag == f"{SVG}svg"


def test_a_page_without_a_plot(wide):
    assert "<img" not in page(wide, with_plot=False)


def browse(path, tmp_path, *options):
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run(
        [*command, *options, path.as_uri()],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        start_new_session=True,
    )
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium (.ci/run installs it)")
def test_a_real_browser_shows_the_page_and_sorts_its_tables(wide, tmp_path):
    path = tmp_path / "page.html"
    clicks = "const head = document.querySelectorAll('th button')[1]; head.click(); head.click();"
    broken = "document.title = document.querySelector('img').naturalWidth > 100 ? 'seen' : 'broken';"
    path.write_text(
        page(wide, with_plot=True).replace(
            "</body>", f"<script>{clicks} onload = () => {{ {broken} }}</script></body>"
        )
    )
    dom = browse(path, tmp_path, "--dump-dom", "--virtual-time-budget=5000")
    assert 'data-ready="yes"' in dom, "its script ran to the end"
    assert "<title>seen</title>" in dom, "the picture is one"
    first = re.search(r"<tbody>(.*?)</tbody>", dom, re.DOTALL).group(1)
    names = re.findall(r"<tr><td>(.*?)</td>", first)
    # Largest throughput first; those without a number, which are at the end when sorted upwards, at the top.
    assert [name for name in names if name not in ("lost", "shm, in place")][:3] == [
        "&lt;rival&gt;",
        "shm",
        "pipe",
    ]
    assert dom.count('aria-sort="descending"') == 1


@pytest.mark.skipif(BROWSER is None, reason="no Chromium (.ci/run installs it)")
def test_a_screenshot_of_the_page_has_contents(wide, tmp_path):
    from matplotlib.image import imread

    path, shot = tmp_path / "page.html", tmp_path / "shot.png"
    path.write_text(page(wide, with_plot=True))
    browse(path, tmp_path, f"--screenshot={shot}", "--window-size=1300,1600")
    image = imread(shot)[..., :3]
    assert image.shape == (1600, 1300, 3)
    blue = np.array([0, 0x72, 0xB2]) / 255  # shm's line
    assert int((np.abs(image - blue).max(axis=2) < 0.02).sum()) > 200
    assert image[:200].std() > 0.05, "a title and sentences"
