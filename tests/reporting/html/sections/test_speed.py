from dataclasses import replace

import pytest

from rtpurbo.reporting.html.sections.section import Missing, Section
from rtpurbo.reporting.html.sections.speed import best_decode, best_ratio, speed_section
from rtpurbo.reporting.html.sources import Origin, Sources, Speed
from tests.reporting.html.example_results import speed_records
from tests.reporting.html.parsed import Page


def sources(records, notes=()):
    return Sources(speed=[Speed(Origin("speed.json", {"device": "a GPU"}), records, list(notes))])


def test_ratios_are_to_the_fastest_dense_kernel_of_the_run():
    records = speed_records()
    faster = replace(records[2], implementation="sdpa-cudnn", milliseconds=0.06)
    ours = records[3]
    assert best_ratio(records, ours) == pytest.approx(2.5)
    assert best_ratio([*records, faster], ours) == pytest.approx(1.5)
    assert best_ratio(records, records[2]) is None
    assert best_ratio([ours], ours) is None


def test_a_plot_and_a_table_for_each_task():
    section = speed_section(sources(speed_records(), ["left out: all else"]))
    assert isinstance(section, Section)
    page = Page(section.body)
    assert (
        page.text("h3") == "One decoding step of one layer One decoding step of one layer, batch 8"
    )
    assert page.text("figcaption") == "Time Ratio"
    assert "rtpurbo, density 3.0 % 40 0.75x 40 2.50x" in page.text()
    assert [each["class"] for each in page.attributes("td") if each.get("class")] == ["slight"]
    assert "Note of speed.json: left out: all else" in page.text()


def test_training_is_held_against_eager_operators():
    records = [
        replace(record, phase="stage1", implementation=name)
        for record in speed_records()[:4]
        for name in [{"sdpa-flash": "eager"}.get(record.implementation, "rtpurbo")]
    ]
    section = speed_section(sources(records))
    assert isinstance(section, Section)
    assert "40 2.50x" in Page(section.body).text()
    assert best_decode(sources(records)) is None


def test_the_headline_is_the_longest_step_of_one_sequence():
    best = best_decode(sources(speed_records()))
    assert best is not None
    ratio, record = best
    assert ratio == pytest.approx(2.5)
    assert (record.context_length, record.batch_size) == (131072, 1)


def test_nothing_measured():
    assert isinstance(speed_section(Sources()), Missing)
