"""What `quire serve` shows a person in a terminal while it loads and once it is ready.

At most MAX_LINES lines in all. Elsewhere the log has the same facts, as JSON.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

from ...engine.config import EngineInfo
from ...engine.layers.layer_groups import describe_window
from ..about import quire_version
from ..settings import DEMO_MODEL_NAME, Settings

MAX_LINES = 12
"""Lines of a start without warnings."""
_QUESTION = """'{"messages": [{"role": "user", "content": "What is quire?"}]}'"""


def terminal() -> Console:
    """Return the console of stderr, without colours if NO_COLOR is set or the terminal is dumb."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def show_loading(console: Console, settings: Settings) -> None:
    """Say what is loaded; progress bars follow."""
    console.print(f"Loading {settings.model or DEMO_MODEL_NAME} …", style="dim", markup=False)


def show_ready(
    console: Console, settings: Settings, info: EngineInfo, address: str, seconds: float
) -> None:
    """Show the model, what fits, and how to talk to the server."""
    title = Text("quire ", style="bold").append(quire_version(), style="bold")
    console.print(title.append(f" is ready after {seconds:.1f} s", style="not bold green"))
    for name, text in (*_facts(settings, info), *_ways(settings, address)):
        line = Text("  ").append(name.ljust(10), style="cyan")
        console.print(line.append(text, style="default"))


def _facts(settings: Settings, info: EngineInfo) -> list[tuple[str, str]]:
    """Return the rows about the model and the memory."""
    millions = info.num_parameters / 1e6
    size = f"{millions / 1e3:,.1f}B" if millions >= 1000 else f"{millions:,.1f}M"
    toy = ", a toy for trying it out" if settings.is_demo else ""
    sequences = info.kv_capacity_tokens / info.max_model_len
    megabytes = info.weight_bytes / 1e6
    kept = info.kv_cache_dtype or info.dtype
    states = ""
    if info.state_bytes:
        states = f"; {info.state_bytes / 1e6:,.1f} MB of state for each sequence"
    drafts = []
    if (draft_model := settings.engine_config().speculative_model) is not None:
        kv_bytes = info.draft_kv_bytes_per_token * info.kv_capacity_tokens
        parts = f"{info.draft_weight_bytes / 1e6:,.1f} MB, and {kv_bytes / 1e6:,.1f} MB of K and V"
        drafts = [("drafts", f"{draft_model}, {parts}")]
    return [
        ("model", f"{', '.join(settings.served_names)} ({info.architecture}, {size}){toy}"),
        (
            "weights",
            f"{info.source_format}, computed in {info.computed_format}, {megabytes:,.1f} MB",
        ),
        ("device", f"{info.device}, {info.dtype}"),
        (
            "KV cache",
            f"{info.kv_capacity_tokens:,} tokens of {kept} = {sequences:,.1f} sequences of "
            f"{info.max_model_len:,} (at most {info.max_num_seqs:,}){states}",
        ),
        *_windows(info),
        *drafts,
    ]


def _windows(info: EngineInfo) -> list[tuple[str, str]]:
    """Return a row that says which layers keep how many tokens, if some have a window."""
    if info.group_windows == (None,):
        return []
    parts = [
        f"{layers} layers keep {describe_window(window)}"
        for window, layers in info.layers_by_window.items()
    ]
    return [("", f"{', '.join(parts)} of each sequence")]


def _ways(settings: Settings, address: str) -> list[tuple[str, str]]:
    """Return the rows about the address, with a command that can be copied."""
    key = ' -H "Authorization: Bearer $QUIRE_API_KEY"' if settings.api_key else ""
    prefix = settings.root_path.strip("/")
    base = f"{address}/{prefix}" if prefix else address
    if settings.uds is not None:
        curl = f"curl --unix-socket {settings.uds} http://quire"
        rows = [("address", address)]
    else:
        curl = f"curl {base}"
        chat = "quire chat" if address == "http://127.0.0.1:8000" else f"quire chat {base}"
        rows = [
            ("address", f"{base}/v1"),
            ("page", f"{base}   (API: {base}/docs)"),
            ("chat", chat),
        ]
    return [*rows, ("try", f"{curl}/v1/chat/completions{key} --json \\"), ("", f"  {_QUESTION}")]
