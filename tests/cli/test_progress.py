import io

from rich.console import Console

from rtpurbo.cli.progress import ProgressBars


def test_a_bar_for_each_stage_with_its_latest_figures():
    console = Console(file=io.StringIO(), width=120)
    with ProgressBars(console) as progress:
        progress("stage1", 1, 10, {"loss": 3.0})
        progress("stage1", 4, 10, {"loss": 1.23456, "recall": 0.9})
        progress("stage2", 0, 5, {})
    first, second = console.file.getvalue().splitlines()
    assert "stage1" in first
    assert "4/10" in first
    assert "loss 1.235  recall 0.9" in first
    assert "stage2" in second
    assert "0/5" in second
