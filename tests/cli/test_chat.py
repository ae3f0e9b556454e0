import re
import shutil
import signal

import pytest
from typer.testing import CliRunner

from rtpurbo.cli import app
from rtpurbo.interruption import stop_requested
from rtpurbo.models.text import VisibleStreamer
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


def test_reads_are_reported(tiny_artifact):
    text = "the special magic numbers are hidden in the provided text " * 6
    shown = talk(tiny_artifact, text, "more", "word " * 3000, options=["--show-reads"])
    assert "error: the conversation has become" in shown.splitlines()[-1]
    first, second = re.findall(r"\[.* cached before; .*B\]", shown)
    assert " 0 of them cached" in first
    assert " 0 of them cached" not in second
    assert re.search(
        r"6 generated; a retrieval head read \d+ of \d+ tokens \(\d+\.\d %\); the cache", first
    )


def test_an_interrupted_answer_stops_and_the_conversation_continues(tiny_artifact, monkeypatch):
    put = VisibleStreamer.put

    def interrupted(self, value):
        is_token = not self.next_tokens_are_prompt
        put(self, value)
        if is_token and not stop_requested():
            signal.raise_signal(signal.SIGINT)

    expected = talk(tiny_artifact, "magic")
    with monkeypatch.context() as patch:
        patch.setattr(VisibleStreamer, "put", interrupted)
        shown = talk(tiny_artifact, "magic", "/reset", "magic")
    first, second = shown.split("A new conversation.\n")
    assert first == second
    assert first.endswith("\n(stopped)\n")
    assert expected.startswith(first.removesuffix("\n(stopped)\n"))


def test_an_interruption_at_the_prompt_does_not_leave(tiny_artifact, monkeypatch):
    lines = iter([KeyboardInterrupt, "/help", EOFError])

    def ask(prompt=""):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", ask)
    shown = talk(tiny_artifact)
    assert shown.startswith("\n/quit or Ctrl-D exits.\n/reset")


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
    sampling = {"do_sample": True, "temperature": 0.5, "top_p": 0.8, "top_k": 9}
    assert options == {"system": "S", "max_new_tokens": 6, "count_reads": True, **sampling}


def test_sampling_follows_its_options(tiny_artifact):
    def answer(*options):
        return talk(tiny_artifact, "magic", options=["--max-new-tokens", "12", *options])

    greedy = answer("--temperature", "0")
    assert answer() == greedy  # the tiny model's settings do not sample
    assert answer("--temperature", "3", "--sampling-top-k", "1") == greedy
    assert answer("--temperature", "3") == answer("--temperature", "3") != greedy
    top_p = ("--sampling-top-p", "0.99", "--seed")
    assert answer(*top_p, "1") != answer(*top_p, "2")


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
    def answer(self, text, streamer):
        streamer.on_finalized_text("a \x1b[2J")
        streamer.on_finalized_text("b")

    monkeypatch.setattr(Conversation, "answer", answer)
    assert "a \\x1b[2Jb" in talk(tiny_artifact, "magic")
