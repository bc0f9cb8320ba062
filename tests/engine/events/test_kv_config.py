"""Test what `--kv-events-config` accepts, and what its errors say."""

from __future__ import annotations

import json

import pytest

from quire.engine.errors import ConfigurationError
from quire.engine.events.kv_config import KVEventsConfig, read_kv_events

VLLM = {
    "enable_kv_cache_events": True,
    "publisher": "zmq",
    "endpoint": "tcp://epp.llm-d:5557",
    "replay_endpoint": "tcp://*:5558",
    "buffer_steps": 100,
    "hwm": 10,
    "max_queue_size": 10,
    "topic": "kv@10.0.0.1@qwen",
}


def test_a_configuration_of_vllm_is_accepted() -> None:
    config = read_kv_events(json.dumps(VLLM))
    assert config == KVEventsConfig(**VLLM) and config.is_on  # type: ignore[arg-type]
    assert not read_kv_events(json.dumps({**VLLM, "publisher": "null"})).is_on
    assert not read_kv_events(None).is_on


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"enabled": true}', "has no field 'enabled': choose from enable_kv_cache_events, "),
        ('{"enable_kv_cache_events": 1}', "enable_kv_cache_events must be true or false, not 1"),
        ('{"endpoint": "5557"}', "endpoint must be an address of ZeroMQ"),
        ('{"endpoint": "tcp://*"}', "endpoint must be an address of ZeroMQ"),
        ('{"endpoint": null}', "endpoint must be an address of ZeroMQ"),
        ('{"replay_endpoint": "udp://*:1"}', "replay_endpoint must be an address"),
        ('{"buffer_steps": -1}', "buffer_steps must be an integer of at least 0, not -1"),
        ('{"hwm": true}', "hwm must be an integer"),
        ('{"publisher": "nats"}', "publisher must be zmq or null"),
        ('{"topic": 3}', "topic must be a string"),
        ('{"encoding": "json"}', 'encoding must be one of map, array, not "json"'),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match="kv_events_config") as caught:
        read_kv_events(text)
    assert message in caught.value.message
