"""The report in headless Chromium, on a desktop and on a phone, light and dark: `pytest -m browser`."""

import json
from pathlib import Path

import PIL.Image
import pytest

from qlora.eval.scores import SHOWN
from qlora.report import plots, record
from qlora.report.html import read, write
from tests.helpers import EVALUATED, write_run
from tests.report import chromium

pytestmark = [pytest.mark.browser, pytest.mark.skipif(chromium.find() is None, reason="there is no Chromium on this machine")]

# The lowest contrast of a text with what is behind it (WCAG 2), and the text; opacity and images do not occur behind text.
CONTRAST = """
(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, style = getComputedStyle(node);
    if (!walker.currentNode.data.trim() || !node.getClientRects().length) continue;
    const color = node instanceof SVGElement ? style.fill : style.color;
    const [low, high] = [luminance(parse(color)), luminance(behind(node))].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), walker.currentNode.data.trim().slice(0, 40)]);
  }
  return found.sort((a, b) => a[0] - b[0])[0];
})()
"""
SMALLEST_TEXT = """
Math.min(...[...document.querySelectorAll("main *, header *")].filter((node) => node.getClientRects().length &&
  [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim())).map((node) => {
    const size = parseFloat(getComputedStyle(node).fontSize), svg = node.closest("svg");
    return svg ? size * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : size;
  }))
"""
SIDEWAYS = """
[...document.querySelectorAll("body *")].filter((node) => node.getClientRects().length && !node.closest(".scroll, pre") &&
  node.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5).map((node) => node.outerHTML.slice(0, 80))
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with chromium.Page(chromium.find(), tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module", params=["finished", "stopped", "empty"])
def path(request, tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "run", finished=request.param == "finished")
    if request.param == "finished":
        side = {"value": -0.512, "low": -0.745, "high": -0.321}
        own = record.sha256_of(folder / "adapter")
        found = {name: {"base": side, "adapter": side, "difference": side} for name in SHOWN}
        (folder / "evaluation.json").write_text(json.dumps(EVALUATED | {"metrics": found, "adapter_sha256": own}))
    if request.param == "empty":
        for name in ("metrics.jsonl", "samples.jsonl"):
            (folder / name).unlink()
    return write(read(folder))


def colors_in(path: Path) -> set[str]:
    """The colors of a PNG file's pixels."""
    image = PIL.Image.open(path).convert("RGB")
    return {"#{:02x}{:02x}{:02x}".format(*color) for _, color in image.getcolors(2**24)}


FONTS = """[...new Set([...document.querySelectorAll("svg text, body")].map((node) => getComputedStyle(node).fontFamily))]"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375], ids=["desktop", "phone"])
def test_the_report_can_be_read(page, path, width, dark, tmp_path):
    page.open(path, width, dark)
    page.screenshot(tmp_path / "report.png")
    assert page.errors == []
    assert page.value("innerWidth") == width and page.value("document.documentElement.scrollWidth") == width
    assert page.value(SIDEWAYS) == []
    lowest, text = page.value(CONTRAST)
    assert lowest >= 4.5, text
    assert page.value(SMALLEST_TEXT) > 9
    light = page.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light != dark


def test_curves_have_the_colors_and_the_font_of_the_page(page, tmp_path):
    path = write(read(write_run(tmp_path / "run")))
    for dark in (False, True):
        page.open(path, 1280, dark)
        page.screenshot(tmp_path / "report.png")
        found = {plots.BLUE, plots.ORANGE} & colors_in(tmp_path / "report.png")
        assert found == (set() if dark else {plots.BLUE, plots.ORANGE})
        assert len(page.value(FONTS)) == 1


def test_what_is_wrong_is_seen(page, path, tmp_path):
    """The test above would fail on a page that asks for something, complains, is too wide, or too faint."""
    wrong = '<img src="https://example.com/x.png"><p style="width: 500px; color: #bbb">wide</p>'
    text = path.read_text().replace("<h1>", f"{wrong}<h1>")
    broken = tmp_path / "broken.html"
    broken.write_text(text)
    page.open(broken, 375, dark=False)
    assert any("example.com" in error for error in page.errors)
    assert page.value("document.documentElement.scrollWidth") > 375 and "wide" in page.value(SIDEWAYS)[0]
    assert page.value(CONTRAST)[0] < 4.5
