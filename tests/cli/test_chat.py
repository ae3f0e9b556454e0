import re
import shutil

import pytest
from typer.testing import CliRunner

from rtpurbo.cli import app
from rtpurbo.serving.chat import Conversation


def talk(artifact, *lines, options=()):
    command = ["chat", str(artifact), "--device", "cpu", "--max-new-tokens", "6", *options]
    result = CliRunner().invoke(app, command, input="\n".join(lines))
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_messages_are_answered_and_the_end_of_the_input_leaves(tiny_artifact):
    once = talk(tiny_artifact, "magic")
    assert once.strip()
    twice = talk(tiny_artifact, "magic", "", "   ", "magic")
    assert twice.startswith(once)
    assert len(twice) > len(once)


def test_quit_leaves_and_reset_begins_anew(tiny_artifact):
    once = talk(tiny_artifact, "magic", "/quit", "magic")
    assert talk(tiny_artifact, "magic") == once
    assert talk(tiny_artifact, "magic", "/reset", "magic") == f"{once}A new conversation.\n{once}"


def test_commands_are_explained(tiny_artifact):
    explained = talk(tiny_artifact, "/help")
    assert re.findall(r"^/\w+", explained, re.M) == ["/reset", "/quit", "/help"]
    assert talk(tiny_artifact, "/what") == f"There is no command /what.\n{explained}"


def test_reads_are_reported(tiny_artifact, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    text = "the special magic numbers are hidden in the provided text " * 6
    shown = talk(tiny_artifact, text, "more", options=["--show-reads"])
    first, second = re.findall(r"\[.* held from before; .*MiB\]|\[.* held .*B\]", shown)
    assert " 0 of them held" in first
    assert " 0 of them held" not in second
    assert re.search(r"6 written; a head read \d+ of \d+ tokens \(\d+\.\d %\); the cache", first)


def test_an_interrupted_answer_stops_and_the_conversation_continues(tiny_artifact, monkeypatch):
    answer = Conversation.answer

    def interrupted(self, text, show):
        def show_one(piece):
            show(piece)
            raise KeyboardInterrupt

        answer(self, text, show_one)

    expected = talk(tiny_artifact, "magic")
    with monkeypatch.context() as patch:
        patch.setattr(Conversation, "answer", interrupted)
        shown = talk(tiny_artifact, "magic", "/reset", "magic")
    first, second = shown.split("A new conversation.\n")
    assert first == second
    assert first.endswith(" (stopped)\n")
    assert expected.startswith(first.removesuffix(" (stopped)\n"))


def test_an_interruption_at_the_prompt_does_not_leave(tiny_artifact, monkeypatch):
    lines = iter([KeyboardInterrupt, "/help", EOFError])

    def ask(prompt=""):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", ask)
    shown = talk(tiny_artifact)
    assert shown.startswith("\n/quit or Ctrl-D leaves.\n/reset")


def test_a_conversation_beyond_the_context_continues_after_a_message(tiny_artifact):
    shown = talk(tiny_artifact, "word " * 3000, "/reset", "magic")
    assert "error: the conversation has become" in shown
    assert shown.endswith(talk(tiny_artifact, "magic"))


def test_options_reach_the_conversation(tiny_artifact, monkeypatch):
    made = []
    init = Conversation.__init__

    def spy(self, model, tokenizer, **options):
        made.append(options)
        init(self, model, tokenizer, **options)

    monkeypatch.setattr(Conversation, "__init__", spy)
    options = [
        "--system",
        "S",
        "--temperature",
        "0.5",
        "--sampling-top-p",
        "0.8",
        "--sampling-top-k",
        "9",
    ]
    talk(tiny_artifact, options=[*options, "--show-reads"])
    [options] = made
    assert vars(options.pop("sampling")) == {"temperature": 0.5, "top_p": 0.8, "top_k": 9}
    assert options == {"system": "S", "max_new_tokens": 6, "count_reads": True}


@pytest.mark.parametrize("target", ["vllm", "transformers"])
def test_exports_chat_too(tiny_artifact, tmp_path, target):
    exported = tmp_path / "export"
    command = ["export", str(tiny_artifact), str(exported), "--to", target]
    result = CliRunner().invoke(app, command)
    assert result.stdout == f"Written to {exported}.\n"
    assert talk(exported, "magic") == talk(tiny_artifact, "magic")


def test_a_missing_chat_template_is_refused(tiny_base, tiny_artifact, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    command = ["chat", str(tiny_artifact), "--base-model", str(base)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert (
        result.stderr.strip().splitlines()[-1].startswith("error: this model has no chat template")
    )


def test_escape_codes_in_an_answer_are_escaped(tiny_artifact, monkeypatch):
    def answer(self, text, show):
        show("a \x1b[2J")
        show("b")

    monkeypatch.setattr(Conversation, "answer", answer)
    assert "a \\x1b[2Jb" in talk(tiny_artifact, "magic")
