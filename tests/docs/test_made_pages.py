"""Pages that are made when the site is built, and pictures that a script draws."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "tooling"))

import families  # noqa: E402
import made_pages  # noqa: E402
import pictures  # noqa: E402


def test_the_page_of_results_has_every_table():
    page = made_pages.results_page()
    for path in made_pages.RESULTS.glob("*.json"):
        found = json.loads(path.read_text())
        is_shown = made_pages._kind(found) is not None
        assert (f"`{path.name}`" in page) == is_shown
        if is_shown:
            assert found["command"] in page
    full, sparse = page.index("| full |"), page.index("| rtpurbo |")
    assert page.index("## Quality") < full < sparse < page.index("## Speed")


def test_a_table_of_a_server(tmp_path, monkeypatch):
    monkeypatch.setattr(made_pages, "RESULTS", tmp_path)
    record = {
        "phase": "serve", "engine": "vllm", "engine_version": "0.32.0", "policy": "rtpurbo",
        "context_length": 32768, "concurrency": 8, "time_to_first_token_ms": 1234.5,
        "time_per_output_token_ms": 9.123, "output_tokens_per_second": 800.0, "cache_tokens": 5000,
    }  # fmt: skip
    facts = {"device": "a GPU", "torch": "2.11", "command": "rtpurbo bench serve", "notes": []}
    (tmp_path / "serve.json").write_text(json.dumps({**facts, "records": [record]}))
    page = made_pages.results_page()
    assert "| vllm 0.32.0 | rtpurbo | 32,768 | 8 | 1,234 | 9.12 | 800.0 | 5,000 |" in page


def test_the_page_of_families_has_a_row_for_every_type_of_the_zoo():
    page = families.families_page()
    supported, rest = page.split("## Text decoders of multimodal models")
    multimodal, refused = rest.split("## Refused")
    for part, names in (
        (supported, families.EQUAL),
        (multimodal, families.WRAPPERS),
        (refused, families.REFUSED),
    ):
        rows = [line for line in part.splitlines() if line.startswith("| ") and "`" in line][1:]
        assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(names)
    assert "| Qwen3 | `qwen3` | none | yes | yes |" in supported
    assert "| Qwen3.5 | `qwen3_5_text` | `linear_attention` | no | no |" in supported
    assert "| gemma3 | `gemma3_text` | `sliding_attention` | yes | yes |" in multimodal
    assert "latent attention" in next(
        line for line in refused.splitlines() if "DeepSeek V3" in line
    )


def test_results_of_one_group_of_ablations_become_tables(tmp_path, monkeypatch):
    right = {"right": [True, False, True], "divergence": [0.1, 0.2, 0.3], "reads": None}
    prose = {"loss": [2.0], "teacher_loss": [1.9], "divergence": [0.1], "reads": None}
    answers = {"4 keys": right, "prose": prose}
    interval = {"mean": 0.1, "ci95": [0.1, 0.1]}
    summary = {
        "score": {"mean": 66.7, "ci95": [0.0, 100.0]},
        "answer_divergence": interval,
        "prose_divergence": interval,
        "perplexity": 7.4,
        "perplexity_ratio": interval,
    }
    group = {
        "group": "window",
        "question": "how long?",
        "reference": "one",
        "origin": {"samples": 3},
        "records": [
            {
                "arm": "one",
                "seconds": 1.0,
                "answers": {"4096": answers},
                "summary": {"4096": summary},
            }
        ],
    }
    (tmp_path / "window.json").write_text(json.dumps(group))
    monkeypatch.setattr(made_pages, "RESULTS", tmp_path)
    page = made_pages.results_page()
    assert "## Ablations" in page
    assert "| one | 67 |" in page


def test_the_page_of_commands_has_every_option():
    page = made_pages.commands_page()
    for text in ("rtpurbo convert", "rtpurbo bench show", "--lora-rank", "--task-data"):
        assert text in page
    assert "**Commands**" not in page  # these lists cut sentences short


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (made_pages.report_page, "smollm2-135m-instruct"),
        (made_pages.report_64k_page, "smollm2-64k-sparse"),
        (made_pages.report_policies_page, "random-heads"),
    ],
)
def test_reports_are_those_of_the_shipped_artifacts(make, name):
    page = make()
    assert page.count("<svg") > 5
    assert "Content-Security-Policy" in page
    assert name in page


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("query.svg", pictures.how_a_query_finds_its_tokens),
        ("heads.svg", pictures.kinds_of_heads),
        ("top-p.svg", pictures.dynamic_top_p),
        ("cache.svg", pictures.what_the_cache_holds),
    ],
)
def test_pictures_are_those_that_the_script_draws(name, draw):
    assert (pictures.IMAGES / name).read_text(encoding="utf-8") == f"{draw()}\n"
