"""`quire chat` and `quire complete` against a server with a fake engine."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from quire.server import cli
from quire.server.commands import answer
from quire.server.commands.chat import Chat
from quire.server.commands.conversation import Conversation, ConversationError
from quire.server.commands.http_client import Chunk, RequestError, Server, server_at
from quire.server.commands.local_server import Endpoint, default_address, find_running
from quire.server.commands.reader import PlainReader
from quire.server.commands.slash import Next, run
from quire.server.text.tokenizer import Tokenizer

from ..fakes import FakeEngineClient

KEY = ["--api-key", "secret"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# -- complete --------------------------------------------------------------------------------


@pytest.mark.parametrize("piped", ["", "and more\n"])
@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_complete_prints_the_answer_alone(
    served: str,
    engine: FakeEngineClient,
    tokenizer: Tokenizer,
    piped: str,
    raw: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipe(monkeypatch, piped)
    words = ["complete", "Say", "hi", "-m", served, *KEY, *raw, "-t", "0.5", "-n", "30"]
    assert cli.main([*words, "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello, world"
    assert "prompt tokens cached" in err
    params = engine.requests[-1].sampling_params
    assert (params.temperature, params.max_tokens) == (0.5, 30)
    prompt = tokenizer.backend.decode(engine.requests[-1].prompt_token_ids)
    assert "Say hi" in prompt and ("and more" in prompt) == bool(piped)


def test_complete_needs_a_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, " \n")
    assert cli.main(["complete"]) == 2
    assert "needs a prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "http://127.0.0.1:9"], "http://127.0.0.1:9 cannot be reached"),
        (["-m", "http://"], "is no address"),
        (["-m", "http://127.0.0.1:9", "--", "--seed", "1"], "for a server that is started"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipe(monkeypatch, "hi")
    assert cli.main(["complete", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("quire: ") and said in error and error.count("\n") == 1


def test_a_wrong_key_and_a_refused_request_say_so(
    served: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("QUIRE_API_KEY", raising=False)
    pipe(monkeypatch, "hi")
    assert cli.main(["complete", "-m", served]) == 1
    assert "--api-key or as QUIRE_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("QUIRE_API_KEY", "secret,other")
    pipe(monkeypatch, "hi")
    assert cli.main(["complete", "-m", served, "-t", "9"]) == 1
    assert "temperature" in capsys.readouterr().err


# -- chat ------------------------------------------------------------------------------------


def test_a_chat_through_a_pipe_answers_each_line(
    served: str,
    engine: FakeEngineClient,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    saved = tmp_path / "chat.json"
    lines = ["one\\", "two", "/temperature 0.25", "/nope", "three", f"/save {saved}", "/exit"]
    pipe(monkeypatch, "\n".join([*lines, "never"]))
    assert cli.main(["chat", f"{served}/v1", *KEY, "--system", "Be brief."]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello, world\nHello, world\n"
    assert "there is no command /nope" in err
    temperatures = [request.sampling_params.temperature for request in engine.requests]
    assert temperatures[1] == 0.25 != temperatures[0]
    values = json.loads(saved.read_text())
    assert values["system"] == "Be brief." and values["parameters"] == {"temperature": 0.25}
    roles = [(each["role"], each["content"]) for each in values["messages"]]
    assert roles == [
        ("user", "one\ntwo"),
        ("assistant", "Hello, world"),
        ("user", "three"),
        ("assistant", "Hello, world"),
    ]
    again = Conversation("tiny")
    again.load(saved)
    assert again.body()["messages"][1:] == values["messages"]


def test_a_question_without_an_answer_is_taken_back(
    served: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "/temperature 9\nhello\n")
    conversation = Conversation("tiny")
    people = Console(file=io.StringIO())
    endpoint = Endpoint(Server(served, "secret"), "tiny", False)
    assert Chat(endpoint, conversation, PlainReader(""), ["tiny"], people).run() == 1
    assert conversation.messages == []
    assert "temperature" in capsys.readouterr().err


def test_on_a_terminal_an_answer_ends_with_its_rate(
    served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    pipe(monkeypatch, "hello\n")
    people = Console(file=out, force_terminal=True, width=80)
    endpoint = Endpoint(Server(served, "secret"), "tiny", False)
    Chat(endpoint, Conversation("tiny"), PlainReader(""), ["tiny"], people).run()
    assert "Hello, world\n" in out.getvalue() and "tokens cached" in out.getvalue()


def test_an_interrupt_stops_the_answer_and_keeps_what_came() -> None:
    closed = []

    def chunks() -> Iterator[Chunk]:
        try:
            yield Chunk("One ")
            yield Chunk("two")
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    found = answer.show(chunks(), io.StringIO(), None, dim=False)
    assert found.was_stopped and found.text == "One two" and closed == [True]
    assert found.summary() == "stopped"


def test_escape_sequences_of_a_model_do_not_reach_a_terminal() -> None:
    def chunks() -> Iterator[Chunk]:
        yield Chunk("", "why \x1b[2J")
        yield Chunk("a\x1b]0;title\x07b\n\tc\x9b")

    for out, text in (
        (Terminal(), "a]0;titleb\n\tc"),
        (io.StringIO(), "a\x1b]0;title\x07b\n\tc\x9b"),
    ):
        reasoning = Terminal()
        found = answer.show(chunks(), out, reasoning, dim=True)
        assert out.getvalue() == text and found.text == "a\x1b]0;title\x07b\n\tc\x9b"
        assert reasoning.getvalue() == "\x1b[2mwhy [2J\x1b[0m\n\n"


def test_the_rate_leaves_out_the_wait_for_the_first_token() -> None:
    usage = {
        "completion_tokens": 11,
        "prompt_tokens": 2000,
        "prompt_tokens_details": {"cached_tokens": 1500},
    }
    found = answer.Answer(usage=usage, asked=1.0, first=1.5, last=3.5, finish_reason="length")
    assert found.summary() == (
        "11 tokens, 5.0 tokens/s, first after 0.50 s, 1,500 of 2,000 prompt tokens cached, "
        "cut at the maximum length"
    )


# -- /commands -------------------------------------------------------------------------------


def test_commands_change_the_conversation(tmp_path: Path) -> None:
    conversation = Conversation("a")
    conversation.ask("hi")
    conversation.answer("hello")

    def said(line: str) -> str:
        return run(line, conversation, ["a", "b"]).said

    assert said("/temperature 0.2") == "temperature: 0.2"
    assert said("/max-tokens 7") == "max_tokens: 7" and conversation.parameters["max_tokens"] == 7
    assert "default" in said("/max_tokens default") and "max_tokens" not in conversation.parameters
    said("/system Be brief.")
    assert conversation.body()["messages"][0] == {"role": "system", "content": "Be brief."}
    said("/model b")
    assert conversation.body()["model"] == "b"
    assert '"Be brief."' in said("/params")
    assert run("/retry", conversation, []).then is Next.ANSWER
    assert [each["content"] for each in conversation.messages] == ["hi"]
    said("/reset")
    assert conversation.messages == [] and conversation.system == "Be brief."
    said("/system")
    assert conversation.body()["messages"] == []
    assert all(f"/{name}" in said("/help") for name in ("save", "temperature", "exit"))
    assert {run(line, conversation, []).then for line in ("/exit", "/quit")} == {Next.EXIT}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/temprature 1", "did you mean /temperature?"),
        ("/temperature hot", "temperature takes a number or default"),
        ("/top_k 1.5", "top_k takes a whole number"),
        ("/model c", "the server has no model c; it has a, b"),
        ("/undo", "there is no question yet"),
        ("/save", "/save needs the name of a file"),
        ("/save /no/such/folder/x", "cannot write"),
        ("/load /no/such/file", "cannot read"),
        ("/image cat.png", "only text can be sent"),
    ],
)
def test_wrong_commands_change_nothing(line: str, message: str) -> None:
    conversation = Conversation("a")
    with pytest.raises(ConversationError, match=message.replace("?", r"\?")):
        run(line, conversation, ["a", "b"])
    assert conversation == Conversation("a")


def test_images_and_foreign_files_are_refused(tmp_path: Path) -> None:
    image = tmp_path / "cat.PNG"
    image.write_bytes(b"")
    conversation = Conversation("a")
    with pytest.raises(ConversationError, match="is an image"):
        conversation.ask(f"'{image}' ")
    for text in ("{", "[]", '{"system": 1, "parameters": {}, "messages": []}'):
        (tmp_path / "x").write_text(text)
        with pytest.raises(ConversationError, match="no saved conversation"):
            conversation.load(tmp_path / "x")
    assert conversation == Conversation("a")


# -- finding and starting a server -----------------------------------------------------------


def test_a_running_server_is_found_by_its_models(
    served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QUIRE_API_KEY", raising=False)
    monkeypatch.delenv("QUIRE_HOST", raising=False)
    monkeypatch.setenv("QUIRE_PORT", served.rsplit(":", 1)[1])
    console = Console(file=io.StringIO())
    for target in (None, "tiny"):
        found = find_running(target, "secret", console)
        assert found == Endpoint(Server(served, "secret"), "tiny", False)
    assert find_running("another", "secret", console) is None
    assert find_running(None, None, console) is None
    assert "asks for a key" in console.file.getvalue()  # type: ignore[attr-defined]
    monkeypatch.setenv("QUIRE_PORT", "9")
    assert find_running(None, None, console) is None


def test_default_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    for host, port, address in (
        ("", "", "http://127.0.0.1:8000"),
        ("0.0.0.0", "81", "http://127.0.0.1:81"),
        ("::", "tcp://10.0.0.1:80", "http://[::1]:8000"),
    ):
        monkeypatch.setenv("QUIRE_HOST", host)
        monkeypatch.setenv("QUIRE_PORT", port)
        assert default_address() == address


def test_addresses_may_end_with_v1() -> None:
    assert server_at("https://a.b/x/v1/", "k") == Server("https://a.b/x", "k")
    for wrong in ("ftp://a", "http://a:x", "https://"):
        with pytest.raises(RequestError, match="is no address"):
            server_at(wrong)


def test_a_server_is_started_for_a_prompt_and_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo model, on a port of its own; the key of the environment is not needed."""
    import psutil

    monkeypatch.setenv("QUIRE_PORT", "9")
    pipe(monkeypatch, "What is quire?")
    before = set(psutil.Process().children(recursive=True))
    assert cli.main(["complete", "-t", "0", "--", "--max-model-len", "512"]) == 0
    assert "inference server" in capsys.readouterr().out
    deadline = time.monotonic() + 5
    while left := set(psutil.Process().children(recursive=True)) - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_server_that_does_not_start_gives_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUIRE_PORT", "9")
    pipe(monkeypatch, "hi")
    began = time.monotonic()
    assert cli.main(["complete", "-m", "/no/such"]) == 1
    assert capsys.readouterr().err == "quire: there is no folder /no/such\n"
    assert time.monotonic() - began < 15


def test_flags_of_a_server_without_the_dashes_are_explained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["chat", "--max-model-len", "5"])
    assert exit.value.code == 2
    assert "-- --max-model-len" in capsys.readouterr().err
