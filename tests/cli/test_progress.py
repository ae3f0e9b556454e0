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


def test_a_log_gets_one_line_for_each_stage():
    console = Console(file=io.StringIO(), width=60)
    with ProgressBars(console) as progress:
        for done in (1, 2):
            progress("stage1", done, 2, {"loss": 2.0 / done})
        progress("stage2", 1, 8, {"loss": 0.5})
    first, second = console.file.getvalue().splitlines()
    assert first.split() == ["0", "s", "stage1", "2/2", "loss", "1"]
    assert second.split() == ["0", "s", "stage2", "1/8", "loss", "0.5"]


def test_a_log_gets_the_last_state_of_a_stage_of_unknown_length():
    console = Console(file=io.StringIO(), width=60)
    with ProgressBars(console) as progress:
        for done in range(4):
            progress("full", done, done, {})
    lines = console.file.getvalue().splitlines()
    assert [line.split()[3] for line in lines] == ["1/1", "3/3"]


def test_a_terminal_gets_bars_and_no_lines():
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    with ProgressBars(console) as progress:
        progress("stage1", 2, 2, {"loss": 1.0})
    assert " s  stage1" not in console.file.getvalue()
    assert "━" in console.file.getvalue()


def test_speed_has_its_unit():
    console = Console(file=io.StringIO(), width=160)
    with ProgressBars(console) as progress:
        progress("stage1", 2, 2, {"loss": 1.0, "tokens_read": 93.4, "tokens_per_second": 45678.9})
    assert "loss 1  tokens read 93.4  tokens/s 45,679" in console.file.getvalue()


def test_other_processes_draw_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    console = Console(file=io.StringIO(), width=160)
    with ProgressBars(console) as progress:
        progress("stage1", 1, 2, {"loss": 1.0})
    assert console.file.getvalue() == ""


def test_a_resumed_stage_does_not_guess_from_what_was_done_before():
    with ProgressBars(Console(file=io.StringIO())) as progress:
        progress("stage1", 501, 600, {})
        [task] = progress._progress.tasks
        assert task.completed == 501
        assert sum(sample.completed for sample in task._progress) <= 1
