"""The report in a real browser: no complaint on the console, nothing fetched, nothing wider than the screen.

Inputs: the pages of the unit tests' sample reports, and a Chromium found on PATH. Without one these tests are skipped,
except where the environment sets CI. Driven by command line flags alone.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from finetune_trainer.report_page import render_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_SECONDS = 90
SCHEMES = {"dark": 0, "light": 1}
"""Values of Blink's preferredColorScheme."""
KINDS = ("make_report", "hostile_report", "full_report", "hostile_full_report")
A4_WIDTH = 718
"""Pixels between the margins that Chromium leaves when it prints."""

# The page forbids scripts, so the frame around it measures. A frame, because a window cannot be 400 pixels wide.
PROBE = """<!doctype html><meta charset="utf-8">
<style>body {{ margin: 0 }} iframe {{ border: 0; display: block }}</style>
<iframe width="{width}" height="30000"></iframe><pre id="found"></pre>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const wide = [...page.querySelectorAll("body *")].filter(element =>
    element.getBoundingClientRect().right > {width} + 0.5 && !element.closest(".scroll, pre.manifest"));
  const texts = [...page.querySelectorAll("body *")].filter(element => element.getClientRects().length &&
    [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
  const sizes = texts.map(element => parseFloat(page.defaultView.getComputedStyle(element).fontSize) *
    (element.ownerSVGElement ? element.ownerSVGElement.getScreenCTM().a : 1));
  document.querySelector("#found").textContent = JSON.stringify({{
    elements: page.querySelectorAll("*").length,
    scrollWidth: root.scrollWidth,
    wide: wide.map(element => element.outerHTML.slice(0, 200)),
    cut: [...page.querySelectorAll(".scroll")].filter(element =>
      element.scrollWidth > element.clientWidth + 1).map(element => element.outerHTML.slice(0, 200)),
    smallest: Math.min(...sizes),
    background: page.defaultView.getComputedStyle(root).backgroundColor,
    colour: page.defaultView.getComputedStyle(root).color,
  }});
}};
frame.srcdoc = {page};
</script>"""


@dataclass(frozen=True, slots=True)
class Visit:
    """What a browser had to say about a page."""

    dom: str
    console: tuple[str, ...]
    fetched: tuple[str, ...]
    """URLs asked for over the network."""


Browser = Callable[..., Visit]


@pytest.fixture(scope="module")
def samples() -> ModuleType:
    """Return the module that builds sample reports: the unit tests of the same page."""
    path = Path(__file__).parents[1] / "unit" / "trainer" / "test_report_page.py"
    specification = importlib.util.spec_from_file_location("report_page_samples", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    """Return what opens a page in a fresh headless Chromium."""
    binary = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if binary is None:
        reason = f"no browser on PATH (looked for {', '.join(BROWSERS)}): the report was NOT tried in a browser"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}; CI must have one: apt-get install chromium")
        pytest.skip(reason)

    def visit(page: str, scheme: str = "light", *flags: str) -> Visit:
        path = tmp_path / "page.html"
        path.write_text(page, encoding="utf-8")
        net_log = tmp_path / "net.json"
        command = [
            binary,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--no-default-browser-check",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--log-net-log={net_log}",
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
            "--window-size=1200,1000",
            "--virtual-time-budget=5000",
            *flags,
            "--dump-dom",
            path.as_uri(),
        ]
        dom, log = run_browser(command)
        return Visit(
            dom=dom,
            console=tuple(re.findall(r"CONSOLE.*", log)),
            fetched=tuple(url for url in requested_urls(net_log) if not url.startswith(("file:", "data:"))),
        )

    return visit


def run_browser(command: list[str]) -> tuple[str, str]:
    """Return what the browser wrote; all of its processes are gone afterwards."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True
    )
    try:
        return process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, log = process.communicate()
        pytest.fail(f"the browser did not end within {TIMEOUT_SECONDS} s; its last words: {log[-2000:]}")


def requested_urls(net_log: Path) -> list[str]:
    """Return every URL in the network log that a page asked for."""
    log = json.loads(net_log.read_text(encoding="utf-8"))
    started = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    events = [event.get("params", {}) for event in log["events"] if event["type"] == started]
    requests = [parameters for parameters in events if "url" in parameters]  # the end of a request has none
    # The browser's own errands (is the clock right, is there an update) have no origin; a page's have one.
    return [request["url"] for request in requests if request.get("initiator") != "not an origin"]


def framed(page: str, width: int) -> str:
    """Return a page that shows ``page`` so wide and writes down what it measures."""
    return PROBE.format(width=width, page=json.dumps(page).replace("</", "<\\/"))


def measured(visit: Visit) -> dict[str, object]:
    found = re.search(r'<pre id="found">(.+?)</pre>', visit.dom, re.DOTALL)
    assert found, f"nothing was measured: {visit.console}"
    return json.loads(re.sub(r"&lt;", "<", re.sub(r"&gt;", ">", found[1])).replace("&amp;", "&"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_opens_without_complaints_and_without_requests(browser: Browser, samples: ModuleType, kind: str):
    visit = browser(render_page(getattr(samples, kind)()))
    assert "Base against tuned" in visit.dom
    assert visit.console == ()
    assert visit.fetched == ()


def test_a_page_that_fetches_and_complains_would_be_noticed(browser: Browser):
    page = "<script>console.error('help')</script><img src='http://localhost:9/x.png'><p>Hello"
    visit = browser(page)
    assert any("help" in line for line in visit.console)
    assert "http://localhost:9/x.png" in visit.fetched


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("kind", KINDS)
def test_the_page_fits_the_screen(browser: Browser, samples: ModuleType, kind: str, width: int, scheme: str):
    found = measured(browser(framed(render_page(getattr(samples, kind)()), width), scheme))
    assert found["elements"] > 200
    assert found["scrollWidth"] == width
    assert found["wide"] == []
    assert found["smallest"] >= 11
    background, colour = (sum(map(int, re.findall(r"\d+", str(found[key])))) for key in ("background", "colour"))
    assert (background < colour) == (scheme == "dark")
    assert abs(background - colour) > 450  # of 765, black on white


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_fits_the_paper(browser: Browser, samples: ModuleType, kind: str):
    """Nothing can be scrolled there, and what a dark screen shows is printed on white."""
    page = render_page(getattr(samples, kind)())
    assert "@media print" in page
    # What is framed is not printed, so the rules for paper are made to hold on the screen.
    found = measured(browser(framed(page.replace("@media print", "@media all"), A4_WIDTH), "dark"))
    assert found["scrollWidth"] == A4_WIDTH
    assert found["wide"] == found["cut"] == []
    assert found["background"] == "rgb(255, 255, 255)"
    assert found["colour"] == "rgb(0, 0, 0)"
