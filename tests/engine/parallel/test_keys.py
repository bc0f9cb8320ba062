"""The links between the hosts of one model: whoever lacks their secret gets nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq

from quire.engine.config import EngineConfig
from quire.engine.errors import ConfigurationError
from quire.engine.network.door import Guard
from quire.engine.network.keys import KeyPair, shared_keys
from quire.engine.parallel import messages


def secret_in(folder: Path, text: str) -> str:
    path = folder / f"key {len(list(folder.iterdir()))}"
    path.write_text(text)
    return str(path)


def test_all_hosts_make_the_same_keys_of_a_secret(tmp_path: Path) -> None:
    first = shared_keys(secret_in(tmp_path, "a long secret of the tests, 1234"))
    assert shared_keys(secret_in(tmp_path, "a long secret of the tests, 1234\n")) == first
    other = shared_keys(secret_in(tmp_path, "another secret of the tests, 123"))
    assert other.public != first.public and other.secret != first.secret
    assert zmq.curve_public(first.secret.encode()) == first.public.encode()
    with pytest.raises(ConfigurationError, match="at least 32 characters, not 5"):
        shared_keys(secret_in(tmp_path, "short"))
    with pytest.raises(ConfigurationError, match="No such file"):
        shared_keys(str(tmp_path / "none"))


def test_an_address_of_a_network_needs_a_secret() -> None:
    two = {"model": "m", "tensor_parallel_size": 2, "nnodes": 2}
    EngineConfig(**two)  # type: ignore[arg-type]
    for own in ("127.0.0.1", "127.3.2.1", "localhost"):
        EngineConfig(**two, master_addr=own)  # type: ignore[arg-type]
    for shared in ("10.0.0.1", "leader.example", "::1", "0.0.0.0"):
        with pytest.raises(ConfigurationError, match="--node-key-file"):
            EngineConfig(**two, master_addr=shared)  # type: ignore[arg-type]
        EngineConfig(**two, master_addr=shared, node_key_file="key")  # type: ignore[arg-type]


def test_only_who_has_the_secret_is_heard(tmp_path: Path) -> None:
    keys = shared_keys(secret_in(tmp_path, "a long secret of the tests, 1234"))
    wrong = KeyPair.make()
    leader = messages.make_socket(zmq.ROUTER)
    guard = Guard(leader, keys)
    guard.admit(keys.public)
    port = leader.bind_to_random_port("tcp://127.0.0.1")
    # The server's key as the client knows it, and the client's own; None for no keys at all.
    tries = [(keys, keys), (wrong, wrong), (keys, wrong), None]
    sockets = []
    try:
        for number, pair in enumerate(tries):
            socket = messages.make_socket(zmq.DEALER)
            sockets.append(socket)
            socket.set(zmq.LINGER, 0)
            if pair is not None:
                server, own = pair
                socket.set(zmq.CURVE_SERVERKEY, server.public.encode())
                socket.set(zmq.CURVE_PUBLICKEY, own.public.encode())
                socket.set(zmq.CURVE_SECRETKEY, own.secret.encode())
            socket.connect(f"tcp://127.0.0.1:{port}")
            socket.send(b"%d" % number)
        heard = []
        while leader.poll(500):
            heard.append(leader.recv_multipart()[-1])
        assert heard == [b"0"]
    finally:
        for socket in sockets:
            socket.close()
        guard.close()
        leader.close(linger=0)
