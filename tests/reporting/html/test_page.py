import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.records import Record, write_results
from rtpurbo.models.artifact_config import LOG_FILE
from rtpurbo.reporting import figures
from rtpurbo.reporting.html.page import page, write_report
from rtpurbo.reporting.html.sections.summary import opening
from rtpurbo.reporting.html.sources import Sources, read_sources
from rtpurbo.reporting.model_card import local_heads
from tests.reporting.html.example_results import LENGTHS, write_examples
from tests.reporting.html.parsed import Page

LOG = "".join(
    f'{{"stage": "stage1", "step": {step}, "loss": {1 / step}, "recall": 0.9}}\n'
    for step in range(1, 400)
)


@pytest.fixture(scope="module")
def html(tiny_artifact, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    artifact = shutil.copytree(tiny_artifact, folder / "artifact")
    (artifact / LOG_FILE).write_text(LOG)
    output = folder / "out" / "report.html"
    write_report([artifact, *write_examples(folder).values()], output)
    return output.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(html):
    return Page(html)


def assert_stands_alone(whole):
    for _, attributes in whole.elements:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "action", "data", "xlink:href", "background")
            assert not name.startswith("on")
            if name == "href":
                assert value.startswith("#") or value == "data:,"
            elif name != "aria-label":
                assert "://" not in (value or "")
            assert "url(" not in (value or "")
    style = whole.text("style")
    assert not re.search(r"url\(|@import|@font-face|//", style)
    assert "fetch" not in whole.text("script")
    assert not {"img", "iframe", "object", "embed", "video", "base"} & {
        name for name, _ in whole.elements
    }
    policies = [each for each in whole.attributes("meta") if "http-equiv" in each]
    assert policies[0]["content"].startswith("default-src 'none'")


def test_nothing_is_loaded(whole):
    assert_stands_alone(whole)


def test_the_heading_is_the_public_name(whole, tiny_artifact):
    # Where the base model is a folder, the artifact's own name, as results have it.
    assert whole.text("h1") == "model"
    assert Page(page(read_sources([tiny_artifact]))).text("h1") == "A local model, sparse"
    shipped = Path(__file__).parents[3] / "artifacts" / "smollm2-135m-instruct"
    assert Page(page(read_sources([shipped]))).text("h1") == "SmolLM2-135M-Instruct, sparse"


def test_the_opening_describes_local_heads_as_the_table_does(tiny_artifact):
    sources = read_sources([tiny_artifact])
    assert local_heads(sources.artifact.config.attention) in opening(sources)


def test_every_part_is_there(whole):
    titles = whole.text("h2")
    for title in (
        "Quality",
        "Retrieval heads",
        "Tokens read",
        "Far tokens per query",
        "KV cache",
        "Speed of other shapes",
        "Training",
        "Settings and provenance",
    ):
        assert title in titles
    assert "Not in this report" not in titles
    text = whole.text()
    assert "4 of its 12 attention heads (33.3 %)" in text
    assert "right answers, dense 98.0 % (RULER at 8K, 2 tests, 50 samples)" in text
    assert "a <note>" in text
    # The mean, its difference to the dense model's, and the interval of that.
    assert "97.5 ▽ -0.5 [-2.0, +0.5]" in text


def test_every_plot_has_marks_and_alternative_text(whole):
    plots = [each for each in whole.attributes("svg") if each.get("class") in ("plot", "heat")]
    assert len(plots) == 13
    for plot in plots:
        assert plot["role"] == "img"
        assert len(plot["aria-label"]) > 30
        assert re.fullmatch(r"0 0 [\d.]+ [\d.]+", plot["viewbox"])
    assert len(whole.of_class("head")) == 12
    assert len(whole.of_class("retrieval")) == len(whole.of_class("dot")) == 4
    assert len(whole.of_class("whisker")) == len(LENGTHS)  # rtpurbo alone is near the dense model
    assert len(whole.of_class("bar")) == 4 * 3  # rtpurbo at both lengths, quest at the longest
    for shape in whole.attributes("use"):
        assert all(re.fullmatch(r"-?[\d.]+", shape[name]) for name in ("x", "y"))


def test_headings_tables_and_anchors_are_in_order(whole):
    levels = [int(name[1]) for name, _ in whole.elements if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    tables = whole.attributes("table")
    assert len([name for name, _ in whole.elements if name == "caption"]) == len(tables) > 8
    assert all(each.get("scope") in ("row", "col") for each in whole.attributes("th"))
    names = [each["id"] for _, each in whole.elements if "id" in each]
    assert len(names) == len(set(names))
    for link in whole.attributes("a"):
        assert link["href"][1:] in names


def test_a_page_is_small(html):
    assert len(html) < 100_000


def test_missing_parts_are_listed(tmp_path):
    quality = write_examples(tmp_path)["old"]
    whole = Page(page(read_sources([quality]), date="2026-01-01"))
    assert_stands_alone(whole)
    text = whole.text()
    for title in ("Retrieval heads", "Far tokens per query", "Speed", "Training"):
        assert title not in whole.text("h2")
        assert title in text.split("Not in this report")[1]
    assert "attention recall is" in text  # explained, but no column of it
    assert "% recall" not in text
    assert "on 2026-01-01" in text
    assert "+2.0 % perplexity at 2K: " in text


def test_an_artifact_alone(tiny_artifact):
    whole = Page(page(read_sources([tiny_artifact])))
    assert "right answers, dense" not in whole.text()
    assert "Quality : no results of `rtpurbo eval` were given." in whole.text()


def test_untrusted_text_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    path = tmp_path / "evil.json"
    record = Record("ruler", evil, 4096, evil, 5, 50.0, 0.1, 100, (40.0, 60.0))
    write_results(path, evil, evil, evil, [record], {evil: evil})
    whole = Page(page(read_sources([path])))
    assert_stands_alone(whole)
    assert len(whole.attributes("script")) == 1
    assert evil in whole.text()


def test_models_are_not_mixed(tmp_path):
    files = []
    for name in ("one", "two"):
        files.append(tmp_path / f"{name}.json")
        write_results(files[-1], name, "cpu", "eval", [Record("needle", "x", 8, "full", 1, 9.0)])
    text = Page(page(read_sources(files))).text()
    assert "Model: one" in text
    assert "Model: two" in text


def test_an_empty_report_does_not_fail():
    assert "Not in this report" in Page(page(Sources())).text("h2")


def test_colours_stand_out_in_light_and_dark(html):
    style = Page(html).text("style")
    light, dark = re.findall(r":root \{(.*?)\}", style)
    for scheme in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", scheme))
        for text, ground in (
            ("ink", "ground"),
            ("soft", "ground"),
            ("soft", "raised"),
            ("accent", "ground"),
            ("heavy-ink", "heavy"),
            ("slight-ink", "slight"),
        ):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for number in range(8):
            assert contrast(colours[f"s{number}"], colours["ground"]) >= 3, number


def contrast(one, other):
    """As WCAG defines it."""
    shares = []
    for colour in (one, other):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        shares.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(shares) + 0.05) / (min(shares) + 0.05)


def test_a_number_does_not_break_from_its_unit(html):
    assert "33.3\u00a0%" in html
    shown = re.sub(r"<(style|script|svg)\b.*?</\1>|<[^>]*>", " ", html, flags=re.DOTALL)
    assert not re.search(r"\d %", shown)


def test_every_caption_of_a_measurement_names_samples_device_and_dtype(tmp_path):
    whole = Page(page(read_sources([write_examples(tmp_path)["quality"]])))
    plots = len(whole.attributes("figure"))
    assert whole.text("small").count("cpu, dtype not recorded") == plots > 5
    # A cache has a size without any question.
    assert whole.text("small").count("25 samples per test") == plots - 1
    captions = whole.text("span")
    assert "RULER at 8K, % right; 25 samples per test; cpu, dtype not recorded" in captions


def test_a_missing_matplotlib_is_explained(monkeypatch, tiny_artifact, tmp_path):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(RTPurboError, match=r"`rtpurbo report` needs matplotlib: pip install"):
        write_report([tiny_artifact], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
