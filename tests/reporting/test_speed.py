from dataclasses import replace
from importlib.util import find_spec

import pytest
from rich.console import Console

from rtpurbo.errors import RTPurboError
from rtpurbo.reporting import figures
from rtpurbo.reporting.speed import save_plot, speed_markdown, speed_tables, speedup
from tests.test_speed_records import RECORD

FLASH = replace(RECORD, implementation="sdpa-flash", density=1.0, milliseconds=425.0)
SHORT = replace(FLASH, context_length=32768, milliseconds=25.0)
STEP = replace(RECORD, phase="decode", batch_size=8, density=0.03, milliseconds=0.05)
RECORDS = [RECORD, FLASH, SHORT, STEP]


def text_of(records):
    console = Console(width=100, record=True, file=None, quiet=False)
    with console.capture() as capture:
        for table in speed_tables(records):
            console.print(table)
    return capture.get()


def test_speedups_are_within_one_task():
    assert speedup(RECORDS, RECORD, "sdpa-flash") == pytest.approx(425 / 30)
    assert speedup(RECORDS, RECORD, "sdpa-cudnn") is None
    assert speedup(RECORDS, STEP, "sdpa-flash") is None
    other_model = replace(FLASH, model="another")
    assert speedup([other_model], RECORD, "sdpa-flash") is None
    for changes in ({"device": "NVIDIA H200"}, {"dtype": "float16"}):
        assert speedup([replace(FLASH, **changes)], RECORD, "sdpa-flash") is None


def test_tables_say_device_and_dtype():
    other = replace(RECORD, device="NVIDIA H200", dtype="bfloat16")
    text = text_of([RECORD, other, replace(other, dtype="float16")])
    assert text.count("implementation") == 3
    assert "prefill (NVIDIA H200, bfloat16)" in text
    assert "prefill (NVIDIA H200, float16)" in text
    assert "**prefill (NVIDIA H200, bfloat16)**" in speed_markdown([other])


def test_a_table_for_each_phase():
    text = text_of(RECORDS)
    assert "prefill" in text
    assert "decode" in text
    assert "14.17" in text
    assert "128K x 8" in text
    assert "331 TFLOP/s" in text
    assert "GB/s" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_times_far_off_the_usual_one_are_marked():
    off = replace(FLASH, usual_milliseconds=100.0)
    text = text_of([RECORD, off])
    assert "425!" in text
    assert "14.17!" in text
    assert "! far off the usual time: sdpa-flash at 128K usually takes 100 ms" in text
    assert "14.17! |" in speed_markdown([RECORD, off])
    assert "usually takes 100 ms" in speed_markdown([RECORD, off])
    assert "!" not in text_of(RECORDS)


def test_tokens_a_second_and_the_memory_of_a_batch():
    record = replace(
        STEP, phase="model-decode", model="m", memory_gb=80.0, tokens_per_second=1234.5
    )
    text = speed_markdown([record])
    assert "| tokens/s |" in text
    assert "128K x 8 in 80 GB" in text
    assert "| 1,234 |" in text
    assert "1,234" in text_of([record])
    assert "tokens/s" not in speed_markdown(RECORDS)


def test_markdown():
    text = speed_markdown(RECORDS)
    assert "| 128K | rtpurbo | 8K | 10.0 % | 30 | 14.17 | - |" in text
    assert text.count("| context |") == 2


def test_no_records_no_tables():
    assert speed_tables([]) == []


def test_drawing_needs_a_package(monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(RTPurboError, match=r"pip install 'rtpurbo\[plots\]'"):
        save_plot(RECORDS, tmp_path / "speed.png")


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs the extra `plots`")
def test_a_picture(tmp_path):
    save_plot(RECORDS, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000
    save_plot(RECORDS, tmp_path / "speed.svg")
    assert "var(--s0)" in (tmp_path / "speed.svg").read_text()
    whole = replace(RECORD, phase="model-prefill", model="one, 2 layers")
    save_plot([whole, replace(whole, model="another, 2 layers")], tmp_path / "models.svg")
    text = (tmp_path / "models.svg").read_text()
    assert "one, 2 layers" in text
    assert "another, 2 layers" in text
    with pytest.raises(RTPurboError, match="cannot be drawn"):
        save_plot(RECORDS, tmp_path / "speed.unknown")
