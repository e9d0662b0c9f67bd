"""The report and the comparison in a real browser: figures have a size, a phone shows all, colours follow dark mode."""

import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from jobs.reporting.html.compare import comparison
from jobs.reporting.html.report import report
from tests.unit.jobs.reporting.html.accounts import account
from tests.unit.jobs.reporting.test_comparison import entry

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine; .ci/run installs one where it can")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
MEASURE = """<script>document.title = JSON.stringify({wide: document.documentElement.scrollWidth, figures:
[...document.querySelectorAll("figure svg")].map(s => [s.getBoundingClientRect().width, s.getBoundingClientRect().height]),
texts: [...document.querySelectorAll("figure svg text")].length})</script>"""


def browse(tmp_path, *options):
    command = [BROWSER, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture
def pages(tmp_path):
    entries = [entry("first", 1_000_000, 11.0), entry("second", 2_000_000, 10.5, kl=0.05)]
    return {"report": report(account(tmp_path)), "comparison": comparison(entries)}


@pytest.mark.parametrize(("name", "figures"), [("report", 9), ("comparison", 2)])
def test_figures_are_there_and_a_phone_shows_all(tmp_path, pages, name, figures):
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", pages[name]).replace("</body>", f"{MEASURE}</body>")
    (tmp_path / "page.html").write_text(page)
    for width in (500, 1200):  # the narrowest window that a headless Chromium opens
        shown = browse(tmp_path, f"--window-size={width},900", "--dump-dom", (tmp_path / "page.html").as_uri())
        found = json.loads(re.search(r"<title>(\{.*?\})</title>", shown, re.DOTALL).group(1).replace("&quot;", '"'))
        assert found["wide"] <= width
        assert len(found["figures"]) == figures
        assert all(wide > 250 and high > 50 for wide, high in found["figures"])
        assert found["texts"] > 10 * figures


def test_a_picture_of_it_in_both_modes(tmp_path, pages):
    (tmp_path / "page.html").write_text(pages["report"])
    grounds = []
    for mode in ([], ["--blink-settings=preferredColorScheme=0"]):
        picture = tmp_path / "picture.png"
        browse(tmp_path, *mode, "--window-size=900,3000", f"--screenshot={picture}", (tmp_path / "page.html").as_uri())
        image = Image.open(picture).convert("RGB")
        colors = {color for _, color in image.getcolors(1 << 24)}
        assert {(15, 131, 201), (217, 115, 13)} <= colors, "the figures' own colours"
        grounds.append(image.getpixel((2, 2)))
    assert grounds == [(255, 255, 255), (21, 22, 26)]
