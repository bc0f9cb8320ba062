"""Sources of settings, their order of precedence, and refused values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from quire.engine.config import EngineConfig, engine_flags
from quire.engine.errors import ConfigurationError
from quire.server.cli import build_parser
from quire.server.settings import GROUPS, Settings, load_settings

UNUSABLE_KEYS = ("", "  ", "\t\n", " sound", "sound\n")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"QUIRE_{name.upper()}", raising=False)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_flags_override_environment_file_and_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write(tmp_path / "quire.yaml", "port: 1\nseed: 1\nmax_n: 1\n")
    monkeypatch.setenv("QUIRE_PORT", "2")
    monkeypatch.setenv("QUIRE_SEED", "2")
    settings = load_settings(config=path, port="3")
    assert (settings.port, settings.seed, settings.max_n) == (3, 2, 1)
    assert settings.max_num_seqs == 256


def test_file_named_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUIRE_CONFIG", write(tmp_path / "quire.yaml", "host: 0.0.0.0\n"))
    assert load_settings().host == "0.0.0.0"


def test_lists_are_read_from_every_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_settings(api_key=["a", "b,c"]).api_key == ("a", "b,c")
    path = write(tmp_path / "quire.yaml", "api_key: [d, e]\nserved_model_name: f\n")
    settings = load_settings(config=path)
    assert (settings.api_key, settings.served_names) == (("d", "e"), ("f",))
    monkeypatch.setenv("QUIRE_API_KEY", "g,h")
    assert load_settings(config=path).api_key == ("g", "h")


@pytest.mark.parametrize(
    "name, empty",
    [
        *((name, empty) for name in ("api_key", "admin_api_key") for empty in UNUSABLE_KEYS),
        *(("api_key", empty) for empty in (",", "sound,", ",sound", "sound, ")),
    ],
)
def test_a_key_that_lets_anyone_in_or_no_one_is_refused_by_name(
    name: str, empty: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refused = pytest.raises(
        ConfigurationError, match=rf"(?i)(\b|QUIRE_){name}\b.*(empty|white space)"
    )
    with refused:
        load_settings(**{name: empty})
    if name == "api_key" and "," not in empty:
        with refused:
            load_settings(api_key=["sound", empty])
    with refused:
        load_settings(config=write(tmp_path / "quire.yaml", f"{name}: {json.dumps(empty)}\n"))
    monkeypatch.setenv(f"QUIRE_{name.upper()}", empty)
    with refused:
        load_settings()
    sound = load_settings(**{name: "sound"})  # a flag wins over the environment
    assert getattr(sound, name) == (("sound",) if name == "api_key" else "sound")


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"port": "70000"}, "port: "),
        (
            {"port": "tcp://10.0.0.7:8000"},
            "port: .*Kubernetes .*enableServiceLinks",
        ),
        ({"max_num_seqs": "0"}, "max_num_seqs: "),
        ({"gpu_memory_utilization": "0"}, "gpu_memory_utilization: "),
        ({"kv_cache_memory": "2 parsecs"}, "kv_cache_memory: "),
        ({"scheduling_policy": "lifo"}, "scheduling_policy: "),
        ({"strict": "perhaps"}, "strict: "),
        ({"tensor_parallel_size": "0"}, "tensor_parallel_size: "),
        ({"ssl_keyfile": "k"}, "ssl_keyfile and ssl_certfile go together"),
        ({"tool_call_parser": "gpt9"}, "tool_call_parser: "),
        ({"reasoning_parser": "hermes"}, "reasoning_parser: "),
        ({"tool_parser": "hermes"}, "tool_parser: there is no such setting"),
        ({"port": "x", "seed": "y"}, "seed: .*; port: "),
        ({"speculative_config": "{"}, "speculative_config: not a JSON object"),
        ({"speculative_config": "[1]"}, "speculative_config: not a JSON object"),
        ({"speculative_config": "{}"}, "speculative_config.model: the draft model is missing"),
        ({"speculative_config": '{"method": "eagle3"}'}, "speculative_config.method: 'eagle3' is"),
        (
            {"speculative_config": '{"model": "m", "prompt_lookup_max": 4}'},
            "speculative_config.prompt_lookup_max: not supported",
        ),
        (
            {"speculative_config": '{"model": "m"}', "speculative_model": "n"},
            "speculative_config: speculative_model is n beside it",
        ),
        (
            {"speculative_config": '{"model": "m", "num_speculative_tokens": 99}'},
            "num.speculative.tokens: must be at most",
        ),
    ],
)
def test_refusals_name_the_setting(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_settings(**flags)


@pytest.mark.parametrize(
    "text, message",
    [
        ("prot: 1\n", "prot: there is no such setting"),
        ("- a\n", "cannot read"),
        ("port: [\n", "cannot read"),
        ("kv_cache_memory: true\n", "kv_cache_memory: must be a size"),
    ],
)
def test_refused_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_settings(config=write(tmp_path / "quire.yaml", text))


def test_engine_config() -> None:
    settings = load_settings(
        model="m", kv_cache_memory="1.5GiB", num_gpu_blocks_override="7", block_size="32"
    )
    config = settings.engine_config()
    assert config.kv_cache_memory_bytes == 3 * 2**29
    assert type(config.kv_cache_memory_bytes) is int
    assert (config.model, config.num_blocks, config.block_size) == ("m", 7, 32)
    with pytest.raises(ConfigurationError, match="power of two"):
        load_settings(block_size="48").engine_config()


def test_every_flag_of_the_engine_is_a_setting_with_the_same_bounds() -> None:
    for flag in engine_flags():
        field = Settings.model_fields[flag.name]
        assert field.default == flag.default and field.description == flag.help
        bounds = {type(bound).__name__: bound for bound in field.metadata}
        for name in ("Ge", "Gt", "Le"):
            bound = getattr(flag, name.lower())
            assert (getattr(bounds[name], name.lower()) if name in bounds else None) == bound


def test_engine_defaults_are_those_of_engine_config() -> None:
    """Loaded settings give an EngineConfig with its own defaults, and say that nobody has chosen
    how many sequences may run."""
    loaded = load_settings(model="m").engine_config()
    assert loaded == EngineConfig(model="m", lowers_max_num_seqs=True)
    assert not load_settings(model="m", max_num_seqs=256).engine_config().lowers_max_num_seqs


def test_served_names() -> None:
    assert load_settings(model="org/m").served_names == ("org/m",)
    assert load_settings(model="org/m", served_model_name=["a", "b"]).served_names == ("a", "b")
    demo = load_settings()
    assert demo.is_demo and demo.served_names == ("quire-demo",)
    assert Path(demo.model_path).name == "demo"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ('{"model": "org/small", "num_speculative_tokens": 5}', ("model", "org/small", 5)),
        ({"model": "org/small", "method": "draft_model"}, ("model", "org/small", 15)),
        ('{"method": "ngram", "num_speculative_tokens": 3}', ("ngram", None, 3)),
        ('{"model": "[ngram]", "draft_tensor_parallel_size": 1}', ("ngram", None, 15)),
    ],
)
def test_the_speculative_config_of_vllm(config: Any, expected: tuple[Any, ...]) -> None:
    """Beside the same values as flags of quire's own, too."""
    method, model, tokens = expected
    for flags in ({}, {"num_speculative_tokens": str(tokens)}):
        found = load_settings(speculative_config=config, **flags).engine_config()
        assert found.speculation == method
        assert (found.speculative_model, found.num_speculative_tokens) == (model, tokens)


def test_every_setting_has_a_flag() -> None:
    """Each setting has a flag that parses to its value, a group and a description."""
    values = {
        "dtype": "float32",
        "device": "cpu",
        "load_format": "dummy",
        "scheduling_policy": "priority",
        "tool_call_parser": "hermes",
        "reasoning_parser": "qwen3",
        "pooling": "mean",
        "speculation": "off",
        "kv_cache_dtype": "fp8_e4m3",
        "quantization": "int8",
        "log_level": "debug",
        "log_format": "json",
        "metrics_prefix": "vllm",
        "config": None,
        "model": None,
    }
    parser = build_parser()
    for name, field in Settings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        if field.annotation is bool:
            arguments, value = [flag], True
        else:
            text = values.get(name, "1")
            if text is None:
                continue
            arguments, value = [flag, text], [text] if field.default == () else text
        assert getattr(parser.parse_args(["serve", *arguments]), name) == value
        extra = field.json_schema_extra
        assert isinstance(extra, dict) and extra["group"] in GROUPS and field.description


@pytest.mark.parametrize(
    "origin", ["*", "null", "http://a", "https://a.b:8443", "app://obsidian.md"]
)
def test_origins_are_accepted(origin: str) -> None:
    assert load_settings(allowed_origins=[origin]).allowed_origins == (origin,)


@pytest.mark.parametrize("origin", ['["*"]', "http://a/", "a.b", "http://a b", "https://*/x"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    """vLLM takes a JSON list; as an origin it would never match, and no one would be told."""
    with pytest.raises(ConfigurationError, match="allowed_origins: .* is not an origin"):
        load_settings(allowed_origins=[origin])


def test_adapters_are_named_folders(tmp_path: Path) -> None:
    settings = load_settings(lora=["a=/x=y", "b/c=z"], lora_dir=str(tmp_path))
    assert settings.adapters == (("a", "/x=y", ""), ("b/c", "z", ""))
    config = settings.engine_config()
    assert config.enable_lora and config.lora == settings.adapters
    assert not load_settings().engine_config().enable_lora
    assert load_settings(lora_dir=str(tmp_path)).engine_config().enable_lora
    assert load_settings(enable_lora="true").engine_config().enable_lora


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora": ["a"]}, "lora: 'a' is not NAME=FOLDER"),
        ({"lora": ["a="]}, "is not NAME=FOLDER"),
        ({"lora": ["=/x"]}, "must have 1 to 128 characters"),
        ({"lora": ["a" * 129 + "=/x"]}, "must have 1 to 128 characters"),
        ({"lora": [" a=/x"]}, "printable, without spaces"),
        ({"lora": ["a\n=/x"]}, "printable, without spaces"),
        ({"lora": ["a=/x", "a=/y"]}, "two adapters have the name 'a'"),
        ({"lora": ["quire-demo=/x"]}, "'quire-demo' is the name of the model itself"),
        ({"lora": ["m=/x"], "served_model_name": ["m"]}, "'m' is the name of the model itself"),
        ({"lora_dir": "/nowhere"}, "lora_dir: there is no folder /nowhere"),
        ({"max_loras": "0"}, "max_loras"),
        ({"max_lora_rank": "0"}, "max_lora_rank"),
        ({"max_cpu_loras": "0"}, "max_cpu_loras"),
    ],
)
def test_bad_adapters_are_configuration_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        load_settings(**fields)


def test_more_adapters_than_may_be_loaded_are_refused() -> None:
    settings = load_settings(lora=["a=/x", "b=/y"], max_cpu_loras="1")
    with pytest.raises(ConfigurationError, match="2 LoRA adapters are more than"):
        settings.engine_config()
