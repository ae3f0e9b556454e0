from dataclasses import replace

import pytest

from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.reporting.html import page
from rtpurbo.reporting.html.sections.speed import best_decode, best_ratio, speed_section
from rtpurbo.reporting.html.sections.summary import headlines
from rtpurbo.reporting.html.sources import Origin, Quality, Sources, Speed
from rtpurbo.reporting.html.view import Missing, Section
from tests.reporting.html.example_results import speed_records
from tests.reporting.html.parsed import Page


def render(blocks):
    module = page._environment().get_template("blocks.html").module
    return "".join(module.block(block) for block in blocks)


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
    page = Page(render(section.blocks))
    assert page.text("h3") == "One decode step of one layer One decode step of one layer, batch 8"
    assert page.text("figcaption") == "Time Speedup"
    assert "rtpurbo, density 3.0 % 40 0.75x 40 2.50x" in page.text()
    assert [each["class"] for each in page.attributes("td") if each.get("class")] == ["slight"]
    assert "Note of speed.json: left out: all else" in page.text()


def test_training_is_compared_with_eager_operators():
    records = [
        replace(record, phase="stage1", implementation=name)
        for record in speed_records()[:4]
        for name in [{"sdpa-flash": "eager"}.get(record.implementation, "rtpurbo")]
    ]
    section = speed_section(sources(records))
    assert isinstance(section, Section)
    assert "40 2.50x" in Page(render(section.blocks)).text()
    assert best_decode(sources(records)) is None


def test_the_headline_is_the_longest_step_of_one_sequence():
    best = best_decode(sources(speed_records()))
    assert best is not None
    ratio, record, origin = best
    assert ratio == pytest.approx(2.5)
    assert (record.context_length, record.batch_size) == (131072, 1)
    assert origin.device == "a GPU"


def test_a_report_without_measurements():
    assert isinstance(speed_section(Sources()), Missing)


def shaped(artifact, **changes):
    """Benchmarks of an artifact's shape, with changes."""
    head_map = artifact.config.head_map
    shape = {
        "num_attention_heads": head_map.num_attention_heads,
        "num_key_value_heads": head_map.num_key_value_heads,
        "head_dim": 16,
    }
    return [replace(record, **{**shape, **changes}) for record in speed_records()]


def of_artifact(artifact, records):
    return replace(sources(records), artifact=artifact, head_dim=16)


def test_speeds_of_other_shapes_are_not_a_models_own(tiny_artifact):
    artifact = ArtifactConfig.read(tiny_artifact)
    own = of_artifact(artifact, shaped(artifact))
    section = speed_section(own)
    assert section.title == "Speed"
    assert "Other shape" not in Page(render(section.blocks)).text()
    for changes in (
        {"head_dim": 32},
        {"num_attention_heads": 64},
        {"model": "qwen3-8b, 36 layers"},
    ):
        section = speed_section(of_artifact(artifact, shaped(artifact, **changes)))
        assert section.title == "Speed of other shapes"
        assert Page(render(section.blocks)).text("h3").count("Other shape: ") == 2
    both = of_artifact(artifact, [*shaped(artifact), *speed_records()])
    text = Page(render(speed_section(both).blocks)).text("h3")
    assert text.index("One decode step") < text.index("Other shape: ")
    # Random weights at a forced density are no headline of a trained model.
    assert len(headlines(own)) == 1
    assert len(headlines(sources(speed_records()))) == 1


def test_results_without_an_artifact_have_no_known_shape():
    given = replace(sources(speed_records()), quality=[Quality("some/model", [])])
    assert speed_section(given).title == "Speed of other shapes"


def test_captions_name_device_dtype_and_density():
    page = Page(render(speed_section(sources(speed_records())).blocks))
    where = "random weights, forced density 3.0 %; a GPU, dtype not recorded, speed.json"
    assert page.text("span").count(where) == len(page.attributes("caption")) == 4
    assert page.text("small").count(where) == len(page.attributes("figure")) == 2
    recorded = [replace(record, dtype="bfloat16") for record in speed_records()]
    page = Page(render(speed_section(sources(recorded)).blocks))
    assert page.text("span").count("a GPU, bfloat16, speed.json") == 4
