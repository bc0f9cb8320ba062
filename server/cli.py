"""The command `quire`."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from ..engine.errors import StartupError
from .settings import GROUPS, Settings, load_settings

_NOTHING = (None, "", ())
"""Defaults that say nothing."""


def main(argv: list[str] | None = None) -> int:
    """0 after a clean end, 1 where a server or a benchmark fails, 2 for a wrong command line."""
    argv = sys.argv[1:] if argv is None else argv
    parsed = build_parser(serve_only=argv[:1] == ["serve"]).parse_args(argv)
    arguments = vars(parsed)
    if arguments.pop("command") == "bench":
        from .bench import command as bench

        return bench.run(parsed)
    try:
        settings = load_settings(**arguments)
        # Not before the flags are known to be right: these imports take a second.
        from .logs import configure_logging, resolve_format
        from .serving.main import serve

        configure_logging(settings.log_level, resolve_format(settings.log_format))
        serve(settings)
    except StartupError as error:
        print(f"quire: {error.message}", file=sys.stderr)
        return 1
    return 0


def build_parser(*, serve_only: bool = False) -> argparse.ArgumentParser:
    """One flag for each field of Settings, under its group's heading.

    `serve_only` leaves out `bench`, whose imports would keep a server from starting its engine.
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
        "--config file. A flag wins over the environment, that over the file.",
        usage="quire serve [MODEL] [flags]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    if not serve_only:
        from .bench import command as bench

        bench.add_parser(commands)
    fields = Settings.model_fields
    serve.add_argument("model", nargs="?", metavar="MODEL", help=fields["model"].description)
    serve.add_argument("--config", metavar="FILE", help=fields["config"].description)
    groups = {name: serve.add_argument_group(name) for name in GROUPS}
    for name, field in fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict):
            groups[str(extra["group"])].add_argument(_flag(name), **_argument(name, field))
    return parser


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _argument(name: str, field: FieldInfo) -> dict[str, Any]:
    """How argparse reads the field; values stay strings, for Settings to check."""
    text = (field.description or "").replace("%", "%%")
    if field.default is True or not (isinstance(field.default, bool) or field.default in _NOTHING):
        text += f" (default: {'on' if field.default is True else field.default})"
    if field.annotation is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    if get_origin(field.annotation) is Literal:
        return {"choices": get_args(field.annotation), "help": text}
    repeatable = field.default == ()
    metavar = name.rsplit("_", 1)[-1].upper()
    return {"action": "append" if repeatable else "store", "metavar": metavar, "help": text}


if __name__ == "__main__":
    sys.exit(main())
