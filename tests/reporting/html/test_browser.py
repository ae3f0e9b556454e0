"""The page in a real browser, where there is one: every plot has a size, nothing is fetched."""

import json
import re
import shutil
import subprocess

import pytest

from rtpurbo.models.artifact_config import LOG_FILE
from rtpurbo.reporting.html.page import write_report
from tests.reporting.html.example_results import write_examples

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOG = "".join(f'{{"stage": "stage2", "step": {step}, "loss": {step}}}\n' for step in range(1, 60))

# The page's policy forbids every request, so one that is tried shows as a violation, not as a resource.
WATCH = """
<script>
const violations = [];
addEventListener("securitypolicyviolation", (event) => violations.push(event.blockedURI));
</script>
"""

# Asks the page about itself.
PROBE = """
<script>
addEventListener("load", () => {
  const size = (item) => { const box = item.getBoundingClientRect(); return [box.width, box.height]; };
  const inside = (svg) => {
    const outer = svg.getBoundingClientRect();
    return [...svg.querySelectorAll("text")].every((item) => {
      const box = item.getBoundingClientRect();
      return box.left > outer.left - 1 && box.right < outer.right + 1;
    });
  };
  const plots = [...document.querySelectorAll("svg.plot, svg.heat")];
  const head = document.querySelector(".retrieval");
  head.dispatchEvent(new PointerEvent("pointerdown", { bubbles: true }));
  const hint = document.getElementById("hint");
  parent.postMessage(JSON.stringify({
    plots: plots.map(size),
    cut: plots.filter((svg) => !inside(svg)).map((svg) => svg.getAttribute("aria-label")),
    marks: [...document.querySelectorAll(".mark:not(.bar)")].map(size),
    hint: hint.hidden ? null : hint.textContent,
    loaded: performance.getEntriesByType("resource").map((entry) => entry.name),
    violations,
    width: innerWidth,
    page: document.documentElement.scrollWidth,
    ground: getComputedStyle(document.body).backgroundColor,
  }), "*");
});
</script>
"""

# No window is as narrow as a phone, but a frame can be.
FRAME = """
<meta name="color-scheme" content="light dark">
<script>
addEventListener("message", (event) => {{
  const answer = document.createElement("script");
  answer.type = "text/plain";
  answer.id = "answer";
  answer.textContent = event.data;
  document.head.append(answer);
}});
</script>
<iframe src="{page}" width="{width}" height="800" style="border: 0"></iframe>
"""


@pytest.fixture(scope="module")
def browser():
    for name in BROWSERS:
        if shutil.which(name):
            return name
    pytest.skip("there is no browser of Chromium's family here")


@pytest.fixture(scope="module")
def report(tiny_artifact, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    artifact = shutil.copytree(tiny_artifact, folder / "artifact")
    (artifact / LOG_FILE).write_text(LOG)
    path = folder / "report.html"
    write_report([artifact, *write_examples(folder).values()], path)
    text = path.read_text(encoding="utf-8").replace("<head>", f"<head>{WATCH}", 1)
    path.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    return path


def asked(browser, page, tmp_path, width, dark):
    """Measurements of the page in a frame of this width in pixels."""
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page=page.as_uri(), width=width), encoding="utf-8")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1400,900",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--virtual-time-budget=3000",
        "--dump-dom",
        frame.as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = re.search(r'<script type="text/plain" id="answer">(.*?)</script>', dom, re.DOTALL)
    assert found, "the page ran no script"
    return json.loads(found[1])


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_plots_have_a_size_and_nothing_is_loaded(browser, report, tmp_path, width, dark):
    answer = asked(browser, report, tmp_path, width, dark)
    assert answer["width"] == width
    assert len(answer["plots"]) == 12
    assert all(width > 100 and height > 50 for width, height in answer["plots"])
    assert not answer["cut"]
    assert len(answer["marks"]) > 60
    assert all(width > 3 and height > 3 for width, height in answer["marks"])
    assert answer["hint"].startswith("layer 0, head 0")
    assert answer["loaded"] == []
    assert answer["violations"] == []
    assert answer["page"] <= answer["width"]
    assert answer["ground"] == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")


@pytest.mark.slow
def test_the_check_for_network_requests_can_fail(browser, report, tmp_path):
    text = report.read_text(encoding="utf-8")
    page = tmp_path / "fetching.html"
    page.write_text(
        text.replace("</main>", '<img src="http://127.0.0.1:9/x.png"></main>'), encoding="utf-8"
    )
    answer = asked(browser, page, tmp_path, 1280, dark=False)
    assert answer["violations"] == ["http://127.0.0.1:9/x.png"]
