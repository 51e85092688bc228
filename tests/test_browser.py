"""The page in a real browser, by `make browser`: it sorts, has two themes, fits a phone, asks for nothing.

Chromium is driven through a pipe, by its own protocol; `$CHROMIUM` names another one than that on the path.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantforge import report

pytestmark = pytest.mark.browser

_SPEC = importlib.util.spec_from_file_location("made_reports", Path(__file__).with_name("made_reports.py"))
made_reports = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(made_reports)

PHONE, DESKTOP = (390, 844), (1280, 900)
# the child's ends of both pipes must be its file descriptors 3 and 4
LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """A headless Chromium with one page; keeps what the page asks for and complains about."""

    def __init__(self, program: str, profile: Path) -> None:
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
        options = ["--headless=new", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe", "--hide-scrollbars",
                   "--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}",
                   *(["--no-sandbox"] if os.geteuid() == 0 else [])]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *map(str, high), program, *options, "about:blank"], pass_fds=high,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self.out, self.into = os.fdopen(ours_out, "wb", buffering=0), os.fdopen(ours_in, "rb", buffering=0)
        self.count, self.rest, self.session = 0, b"", ""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: object) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        self.out.write(json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while True:
            found = self.read()
            if found.get("id") == self.count:
                assert "error" not in found, found
                return found["result"]

    def read(self) -> dict[str, Any]:
        """Return the next message; note requests and complaints."""
        while b"\0" not in self.rest:
            part = self.into.read(2**16)
            assert part, "the browser ended"
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\0")
        found = json.loads(line)
        method, params = found.get("method"), found.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if method == "Runtime.exceptionThrown" or (
            method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert")
        ):
            self.complaints.append(json.dumps(params))
        if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        return found

    def open(self, url: str) -> None:
        """Go to a page and wait until it is there."""
        self.requests.clear()
        self.complaints.clear()
        self.ask("Page.navigate", url=url)
        while self.read().get("method") != "Page.loadEventFired":
            pass

    def show(self, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> None:
        """Set the size of the window and the theme that the reader prefers."""
        self.ask("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        """Press the mouse on the middle of the first element that `selector` finds."""
        self.run(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center', inline: 'center'}})")
        x, y = self.run(
            f"(() => {{ const r = document.querySelector({selector!r}).getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self) -> bytes:
        """Return the whole page as PNG."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        return base64.b64decode(self.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"])

    def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(OSError):
            self.session = ""
            self.out.write(json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.out.close()
        self.into.close()


def program() -> str:
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    assert found, "install Debian's package chromium, or set CHROMIUM"
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(program(), tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the addresses of pages with all that a report can show, of one model, of two, and of two machines."""
    one = made_reports.rich()
    again = dataclasses.replace(one.origins[0], machine={"processor": "another"})
    both = report.merge([one, dataclasses.replace(one, origins=(again,), runs=one.runs[:4])])
    found = {}
    for name, made in (("one", one), ("two", made_reports.two_models()), ("machines", both)):
        folder = tmp_path_factory.mktemp(name)
        report.write(made, folder)
        found[name] = (folder / "report.html").as_uri()
    return found


@pytest.fixture(params=["one", "two", "machines"])
def opened(browser: Browser, pages: dict[str, str], request: pytest.FixtureRequest) -> Iterator[Browser]:
    """Open a page; when the test is through, it must have asked for nothing but itself and complained of nothing."""
    browser.show()
    browser.open(pages[request.param])
    yield browser
    assert browser.requests == [pages[request.param]]
    assert browser.complaints == []


def column(browser: Browser, place: int) -> list[str]:
    return browser.run(
        "Array.from(document.querySelector('table').tBodies[0].rows, "
        f"row => row.cells[{place}].dataset.value)"
    )  # fmt: skip


def place_of(browser: Browser, heading: str) -> int:
    return browser.run(
        "Array.from(document.querySelector('table').tHead.rows[0].cells)"
        f".findIndex(cell => cell.innerText.trim() === {heading!r})"
    )


@pytest.mark.parametrize("heading", ["perplexity", "size (MB)"])
def test_a_press_on_a_heading_sorts_by_number_and_another_turns_the_order(opened, heading):
    place = place_of(opened, heading)
    before = column(opened, place)
    selector = f"thead th:nth-child({place + 1}) button"
    opened.click(selector)
    up = column(opened, place)
    assert up == sorted(before, key=float)
    assert up != before
    assert opened.run("document.querySelector('th[aria-sort]').getAttribute('aria-sort')") == "ascending"
    opened.click(selector)
    assert column(opened, place) == sorted(before, key=float, reverse=True)


def test_names_sort_as_people_count_and_what_is_missing_stays_last(opened):
    opened.click("thead th:first-child button")
    found = column(opened, 0)
    assert found[0].startswith("awq")
    assert [name[:8] for name in found if name.startswith("rtn")] == sorted(
        name[:8] for name in found if name.startswith("rtn")
    )
    seconds = "Array.from(document.querySelectorAll('table')[1].tBodies[0].rows, row => row.cells[3].dataset.value)"
    for _ in range(2):
        opened.click("section:first-of-type h3 + .scroll thead th:nth-child(4) button")
        values = opened.run(seconds)
        count = len([value for value in values if value])
        assert 0 < count < len(values)
        assert all(values[:count])


LUMINANCE = """
(() => {
  const channel = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = color => { const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(channel);
                           return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const ratio = color => { const l = light(color); return (Math.max(l, paper) + 0.05) / (Math.min(l, paper) + 0.05); };
  const of = (selector, property = "color") => {
    const found = document.querySelector(selector);
    return found && ratio(getComputedStyle(found)[property]);
  };
  return {paper, ink: of("p.lede"), soft: of("figcaption"), detail: of("td small"), alert: of("p.alert"),
          worse: of("td.worse"), drawn: of("svg text", "fill")};
})()
"""


def test_both_themes_can_be_read(opened):
    papers = {}
    for scheme in ("light", "dark"):
        opened.show(scheme=scheme)
        found = opened.run(LUMINANCE)
        papers[scheme] = found.pop("paper")
        assert found["ink"] > 7
        assert min(found.values()) > 4.2, found
    assert papers["light"] > 0.8
    assert papers["dark"] < 0.05


@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_the_page_is_as_wide_as_the_window_and_only_tables_scroll(opened, size):
    opened.show(size)
    assert opened.run("document.documentElement.scrollWidth") <= size[0]
    shown = {
        kind: opened.run(f"getComputedStyle(document.querySelector('.{kind}')).display") for kind in ("wide", "narrow")
    }
    assert shown == ({"wide": "none", "narrow": "block"} if size == PHONE else {"wide": "block", "narrow": "none"})


OVERLAPS = """
Array.from(document.querySelectorAll("figure svg")).filter(s => s.getBoundingClientRect().width > 0).flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  const texts = Array.from(svg.querySelectorAll("text"), t => [t.textContent, t.getBoundingClientRect()]);
  return texts.flatMap(([name, a], i) => [
    ...(a.left < frame.left - 2 || a.right > frame.right + 2 || a.top < frame.top - 2 || a.bottom > frame.bottom + 2
        ? [name + " is cut off"] : []),
    ...texts.slice(i + 1).filter(([, b]) =>
      Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 &&
      Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4
    ).map(([other]) => name + " on " + other)]);
})
"""


@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_no_text_of_a_plot_lies_on_another_or_is_cut_off(opened, size):
    opened.show(size)
    assert opened.run(OVERLAPS) == []
