"""The command `quire`: the commands, and the flags of `quire serve`.

The flags of `quire serve` are read off the fields of `Settings` by code of our own rather than by
pydantic-settings' `CliApp`, which has no argument groups: its `--help` would be one list of 70
flags.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import ByteSize
from pydantic.fields import FieldInfo

from ..engine.errors import ConfigurationError, StartupError
from .about import quire_version
from .foreign_flags import explain
from .setting_sources import origins_of
from .settings import GROUPS, Settings, read_settings

if TYPE_CHECKING:
    from .serving.main import MakeClient


COMMANDS = (
    "serve",
    "chat",
    "complete",
    "models",
    "doctor",
    "bench",
    "plan",
    "deploy",
    "completion",
)
_OURS = ("command", "serve_flags")
"""Names in the parsed command line that are no flags of the command."""
_WITH_SERVER = ("chat", "complete")
"""Commands that start a server, whose flags stand after --."""


def main(argv: list[str] | None = None, make_client: MakeClient | None = None) -> int:
    """Run a command and return its exit code.

    The code is 0 after a clean end, 1 if a command fails, and 2 for a wrong command line or a wrong
    setting. `make_client` makes the server's engine client in place of ProcessEngineClient.
    """
    from .commands import completion

    argv = sys.argv[1:] if argv is None else argv
    serve_flags: list[str] = []
    if argv[:1] and argv[0] in _WITH_SERVER and "--" in argv:
        place = argv.index("--")
        argv, serve_flags = argv[:place], argv[place + 1 :]
    parser = build_parser(None if completion.is_asked() or not argv else argv[0])
    if completion.is_asked():
        completion.answer(parser)
    if not argv:
        parser.print_help()
        return 0
    _check_command(parser, argv[0])
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_refusal(unknown, parsed.command, parser))
    parsed.serve_flags = serve_flags
    try:
        return _run(parsed, make_client)
    except StartupError as error:
        print(f"quire: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if parsed.command == "serve" and "print_config" not in parsed:
            raise
        # Whoever read the output has enough, such as head. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(parsed: argparse.Namespace, make_client: MakeClient | None) -> int:
    """Run the parsed command. Raises StartupError, and ConfigurationError for what was given."""
    match parsed.command:
        case "bench":
            from .bench import command as bench

            return bench.run(parsed)
        case "plan":
            from .bench import planning

            return planning.run(parsed)
        case "deploy":
            from .ray_app import command as deploy

            given = vars(parsed)
            return deploy.run({name: value for name, value in given.items() if name not in _OURS})
        case "models":
            from .commands import models

            return models.run(parsed)
        case "chat":
            from .commands import chat

            return chat.run(parsed)
        case "complete":
            from .commands import complete

            return complete.run(parsed)
        case "doctor":
            from .commands import doctor

            return doctor.run(parsed)
        case "completion":
            from .commands import completion

            return completion.run(parsed)
    return _serve(parsed, make_client)


def _serve(parsed: argparse.Namespace, make_client: MakeClient | None) -> int:
    """Serve until the end, or print the settings. Raises StartupError."""
    flags = {name: value for name, value in vars(parsed).items() if name in Settings.model_fields}
    settings = read_settings(flags)
    settings.engine_config()
    if "print_config" in parsed:
        from .commands.effective import effective

        print(effective(settings, origins_of(flags, Settings.model_fields)))
        return 0
    # These imports take a second, so they wait until the flags are known to be right.
    from .logs import configure_logging, resolve_format
    from .serving.main import serve

    configure_logging(settings.log_level, resolve_format(settings.log_format))
    try:
        serve(settings, make_client)
    except ConfigurationError as error:  # of the machine rather than of the command line
        raise StartupError(error.message) from error
    return 0


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser, with a flag for each field of Settings under its group's heading.

    With a `command` it knows the flags of that one only: the imports of the others would delay the
    start of the engine.
    """
    parser = argparse.ArgumentParser(
        prog="quire",
        description="An inference server with OpenAI's API.",
        epilog="`quire COMMAND --help` shows the flags of a command. To begin: quire chat",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"quire {quire_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    from .commands import arguments

    add: dict[str, Callable[[Any], None]] = {
        "serve": _add_serve,
        "chat": arguments.add_chat,
        "complete": arguments.add_complete,
        "models": _add_models,
        "doctor": arguments.add_doctor,
        "bench": _add_bench,
        "plan": _add_plan,
        "deploy": _add_deploy,
        "completion": arguments.add_completion,
    }
    for name in COMMANDS if command not in COMMANDS else (command,):
        add[name](commands)
    return parser


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP.",
        epilog="Each flag can also be set as QUIRE_NAME in the environment, or as name in the "
        "--config file. A flag wins over the environment, and the environment over the file.",
        usage="quire serve [MODEL] [flags]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    _add_settings(serve)
    serve.add_argument(
        "--print-config",
        action="store_true",
        help="Print all settings as YAML, with the source of each, and exit.",
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and the flags of all settings."""
    from .commands import completion

    fields = Settings.model_fields
    model = parser.add_argument(
        "model", nargs="?", metavar="MODEL", help=fields["model"].description
    )
    completion.with_models(model)
    parser.add_argument("--config", metavar="FILE", help=fields["config"].description)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for flag in grouped_flags():
        names = (flag.option, *_ALIASES.get(flag.name, ()))
        action = groups[flag.group].add_argument(*names, **_argument(flag))
        completion.with_choices(action, _choices(flag.field.annotation))


def _add_deploy(commands: Any) -> None:
    from .ray_app.options import add_flags

    deploy = commands.add_parser(
        "deploy",
        help="serve a model on a Ray cluster",
        description="Serve a model on a Ray cluster, or on this machine as one.",
        usage="quire deploy [MODEL] [--replicas MIN:MAX] [flags of quire serve]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add_flags(deploy)
    _add_settings(deploy)


def _add_bench(commands: Any) -> None:
    from .bench import command as bench

    bench.add_parser(commands)


def _add_plan(commands: Any) -> None:
    from .bench import planning

    planning.add_parser(commands)


def _add_models(commands: Any) -> None:
    from .commands import models

    models.add_parser(commands)


_ALIASES = {"lora": ("--lora-modules",)}
"""Other names of flags."""
_METAVARS: dict[Any, str] = {
    int: "N",
    int | None: "N",
    bool | None: "BOOL",
    ByteSize: "SIZE",
    ByteSize | None: "SIZE",
    Path | None: "FILE",
}
"""What --help shows for a value, by its type. Values of other types show the flag's last word."""
_METAVARS_BY_NAME = {
    "uds": "SOCKET",
    "allowed_origins": "ORIGIN",
    "lora": "NAME=FOLDER",
    "lora_dir": "FOLDER",
    "chat_template": "FILE|TEXT",
    "score_template": "FILE|TEXT",
    "score_tokens": "TOKEN[,TOKEN]",
    "generation_config": "auto|none|FOLDER",
    "gpu_memory_utilization": "SHARE",
    "gguf_file": "FILE",
}
MAX_SHOWN_CHOICES = 7
"""Choices that --help lists in place of a name for the value."""


class ServeFlag(NamedTuple):
    """A field of Settings that is listed under a group."""

    name: str
    group: str
    field: FieldInfo
    details: str

    @property
    def option(self) -> str:
        """The flag as it is written on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def default(self) -> str | None:
        """The default as users write it; None if the flag is unset by default."""
        value = self.field.default
        if isinstance(value, bool):
            return "on" if value else "off"
        return None if value in (None, "", ()) else str(value)


def grouped_flags() -> Iterator[ServeFlag]:
    """Yield the flags of `quire serve` group by group."""
    for group in GROUPS:
        for name, field in Settings.model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra["group"] == group:
                yield ServeFlag(name, group, field, str(extra["details"]))


def _check_command(parser: argparse.ArgumentParser, word: str) -> None:
    """Exit with the nearest command if the first word is none of them."""
    if word.startswith("-") or word in COMMANDS:
        return
    close = difflib.get_close_matches(word, COMMANDS, 1, cutoff=0.5)
    hint = f"did you mean quire {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
    parser.error(f"there is no command {word}: {hint}")


def _refusal(unknown: list[str], command: str, parser: argparse.ArgumentParser) -> str:
    """Return the message about unknown arguments, with a line of advice for each flag."""
    lines = [f"unrecognized arguments: {' '.join(unknown)}"]
    flags = [word for word in unknown if word.startswith("--")]
    if command in ("serve", "deploy"):
        known = ["--config", "--print-config", *(flag.option for flag in grouped_flags())]
        lines += [explain(word, known) for word in flags]
    elif command in _WITH_SERVER and flags:
        lines.append(f"flags of the server stand after --: quire {command} … -- {flags[0]}")
    return "\n  ".join(lines)


def _choices(annotation: Any) -> tuple[str, ...]:
    """Return the values of a Literal, which may also be None; empty for other types."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(
        choice
        for part in get_args(annotation)
        if get_origin(part) is Literal
        for choice in get_args(part)
    )


def _argument(flag: ServeFlag) -> dict[str, Any]:
    """Return argparse's keywords for a flag. Values stay strings, which Settings checks."""
    field = flag.field
    text = (field.description or "").replace("%", "%%")
    if flag.default not in (None, "off"):
        text += f" (default: {flag.default})"
    if field.annotation is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    repeatable = field.default == ()
    return {
        "action": "append" if repeatable else "store",
        "metavar": _metavar(flag),
        "help": text,
    }


def _metavar(flag: ServeFlag) -> str:
    """Return what --help shows for a flag's value."""
    choices = _choices(flag.field.annotation)
    if 0 < len(choices) <= MAX_SHOWN_CHOICES:
        return f"{{{','.join(choices)}}}"
    if choices:
        return "FORMAT"
    if flag.name in _METAVARS_BY_NAME:
        return _METAVARS_BY_NAME[flag.name]
    if (flag.field.description or "").startswith("Seconds"):
        return "SECONDS"
    return _METAVARS.get(flag.field.annotation, flag.name.rsplit("_", 1)[-1].upper())


if __name__ == "__main__":
    sys.exit(main())
