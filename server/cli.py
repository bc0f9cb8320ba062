"""The command `quire`: `quire serve`, `deploy`, `models`, `bench` and `plan`.

The flags of `quire serve` are read off the fields of `Settings` by code of our own rather than by
pydantic-settings' `CliApp`, which has no argument groups: its `--help` would be one list of 70
flags.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import ByteSize
from pydantic.fields import FieldInfo

from ..engine.errors import StartupError
from .foreign_flags import explain
from .settings import GROUPS, Settings, load_settings

if TYPE_CHECKING:
    from .serving.main import MakeClient


def main(argv: list[str] | None = None, make_client: MakeClient | None = None) -> int:
    """Run a command and return its exit code.

    The code is 0 after a clean end, 1 if a server or a benchmark fails, and 2 for a wrong command
    line. `make_client` makes the server's engine client in place of ProcessEngineClient.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(serve_only=argv[:1] == ["serve"])
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_refusal(unknown, is_serve=parsed.command in ("serve", "deploy")))
    arguments = vars(parsed)
    command = arguments.pop("command")
    if command == "bench":
        from .bench import command as bench

        return bench.run(parsed)
    if command == "plan":
        from .bench import planning

        return planning.run(parsed)
    if command == "models":
        from . import models_command

        return models_command.run(parsed)
    try:
        if command == "deploy":
            from .ray_app import command as deploy

            return deploy.run(arguments)
        settings = load_settings(**arguments)
        # These imports take a second, so they wait until the flags are known to be right.
        from .logs import configure_logging, resolve_format
        from .serving.main import serve

        configure_logging(settings.log_level, resolve_format(settings.log_format))
        serve(settings, make_client)
    except StartupError as error:
        print(f"quire: {error.message}", file=sys.stderr)
        return 1
    return 0


def build_parser(*, serve_only: bool = False) -> argparse.ArgumentParser:
    """Return the parser, with a flag for each field of Settings under its group's heading.

    `serve_only` leaves out the other commands, whose imports would delay the start of the engine.
    """
    parser = argparse.ArgumentParser(
        prog="quire", description="An OpenAI-compatible inference server.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"quire {version('quire')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
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
    if not serve_only:
        from . import models_command
        from .bench import command as bench
        from .bench import planning

        bench.add_parser(commands)
        planning.add_parser(commands)
        models_command.add_parser(commands)
        _add_deploy(commands)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    fields = Settings.model_fields
    parser.add_argument("model", nargs="?", metavar="MODEL", help=fields["model"].description)
    parser.add_argument("--config", metavar="FILE", help=fields["config"].description)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for flag in grouped_flags():
        names = (flag.option, *_ALIASES.get(flag.name, ()))
        groups[flag.group].add_argument(*names, **_argument(flag))


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


def _refusal(unknown: list[str], *, is_serve: bool) -> str:
    """Return the message about unknown arguments, with a line of advice for each flag."""
    lines = [f"unrecognized arguments: {' '.join(unknown)}"]
    if is_serve:
        known = ["--config", *(flag.option for flag in grouped_flags())]
        lines += [explain(word, known) for word in unknown if word.startswith("--")]
    return "\n  ".join(lines)


def _argument(flag: ServeFlag) -> dict[str, Any]:
    """Return argparse's keywords for a flag. Values stay strings, which Settings checks."""
    field = flag.field
    text = (field.description or "").replace("%", "%%")
    if flag.default not in (None, "off"):
        text += f" (default: {flag.default})"
    if field.annotation is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    if get_origin(field.annotation) is Literal:
        return {"choices": get_args(field.annotation), "help": text}
    repeatable = field.default == ()
    metavar = _METAVARS.get(field.annotation, flag.name.rsplit("_", 1)[-1].upper())
    return {"action": "append" if repeatable else "store", "metavar": metavar, "help": text}


if __name__ == "__main__":
    sys.exit(main())
