"""The file of keys: what it may hold, how it is refused, and how a change of it is followed."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from quire.engine.errors import ConfigurationError
from quire.server.settings import load_settings
from quire.server.tenants import key_ring, rates
from quire.server.tenants.key_ring import KeyRing, KeySource
from quire.server.tenants.keys_file import read_keys_file
from quire.server.tenants.tenant import Limits

STANDARD = Limits(5, 100, 2)
SECRET = "sk-very-secret-value"


def write(folder: Path, text: str) -> Path:
    path = folder / "keys.yaml"
    path.write_text(text)
    return path


def test_names_keys_digests_and_limits_are_read(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"sk-bob").hexdigest()
    path = write(
        tmp_path,
        f"""
        alice: sk-alice
        bob:
          key: sha256:{digest.upper()}
          tokens_per_minute: 7
          concurrent_requests: null
          models: [tiny, story]
        "123": {{key: [sk-old, sk-new]}}
        root@example: {{key: sk-root, admin: true, requests_per_minute: 9}}
        """,
    )
    alice, bob, number, root = read_keys_file(path, STANDARD)
    assert (alice.name, alice.limits, alice.models) == ("alice", STANDARD, None)
    assert bob.limits == Limits(5, 7, None) and bob.models == ("tiny", "story")
    assert not bob.may_use("other") and bob.may_use("story") and alice.may_use("other")
    assert root.is_admin and root.limits == Limits(9, None, None)
    assert len({tenant.owner for tenant in (alice, bob, number, root)}) == 4
    ring = KeyRing(KeySource(load_settings(api_keys_file=path)).tenants)
    for key, name in (
        ("sk-alice", "alice"),
        ("sk-bob", "bob"),
        ("sk-old", "123"),
        ("sk-new", "123"),
    ):
        found = ring.find([key])
        assert found is not None and found.name == name
    assert ring.find([f"sha256:{digest}"]) is None and ring.find([]) is None
    assert ring.has_several and ring.has_admins


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "at least one"),
        ("[a, b]", "mapping"),
        ("- \t{", "not valid YAML in line 1"),
        (f"a: {SECRET}\nb: [", "not valid YAML in line 2"),
        (f"a: {SECRET}\na: {SECRET}", "'a' is there twice"),
        (f"a: {{key: {SECRET}, key: b}}", "'key' is there twice"),
        (f"a: {SECRET}\nb: {SECRET}", "a and b have the same key"),
        (f"{SECRET}-and-much-longer!: a", "is not a name"),
        (f"1: {SECRET}", "is not a name"),
        ("a: 12345", "a: key must be a text"),
        ("a: ''", "a: the key is empty"),
        ("a: ' b'", "white space"),
        ("a: null", "a: key must be a text"),
        ("a: {admin: true}", "a: key must be a text"),
        ("a: {key: []}", "a: the key is missing"),
        ("a: sha256:abc", "64 hexadecimal digits"),
        (f"a: {{key: {SECRET}, admin: 1}}", "admin must be true or false"),
        (f"a: {{key: {SECRET}, rpm: 1}}", "'rpm' is not one of"),
        (f"a: {{key: {SECRET}, requests_per_minute: 0}}", "a whole number from 1 on"),
        (f"a: {{key: {SECRET}, tokens_per_minute: true}}", "a whole number from 1 on"),
        (f"a: {{key: {SECRET}, models: tiny}}", "models must be a list"),
        ("a: !!python/object/apply:os.system [true]", "not valid YAML"),
        ("a: " + "[" * 5000, "not"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line_without_keys(
    tmp_path: Path, text: str, reason: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigurationError) as caught:
        read_keys_file(path, STANDARD)
    message = caught.value.message
    assert reason in message and str(path) in message and "\n" not in message
    assert SECRET not in message


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        KeySource(load_settings(api_keys_file=tmp_path / "none.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        read_keys_file(tmp_path / "bytes.yaml", STANDARD)
    path = write(tmp_path, "a: one")
    for flags in ({"api_key": ("one",)}, {"admin_api_key": "one"}):
        with pytest.raises(ConfigurationError, match="also given by a flag") as caught:
            KeySource(load_settings(api_keys_file=path, **flags))
        assert "one" not in caught.value.message


def test_slots_stay_and_do_not_run_out_unnoticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "a: one\nb: two")
    monkeypatch.setattr(key_ring, "MAX_SLOTS", 4)
    source = KeySource(load_settings(api_keys_file=path))
    slots = {tenant.name: tenant.slot for tenant in source.tenants}
    assert slots == {"": 0, "a": 1, "b": 2}
    write(tmp_path, "b: two\nc: three")
    assert [tenant.slot for tenant in source._read()] == [0, 2, 3]
    write(tmp_path, "d: four")
    with pytest.raises(ConfigurationError, match="more than 3 keys"):
        source._read()
    assert rates.MAX_SLOTS > 1000


async def test_a_changed_file_is_followed_and_a_broken_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(key_ring, "POLL_SECONDS", 0.01)
    logged: list[tuple[str, dict[str, object]]] = []

    class Log:
        def info(self, event: str, **fields: object) -> None:
            logged.append((event, fields))

        error = info

    monkeypatch.setattr(key_ring, "log", Log())
    path = write(tmp_path, "alice: one")
    source = KeySource(load_settings(api_keys_file=path))
    ring = KeyRing(source.tenants)
    watching = asyncio.create_task(source.watch(ring.replace))

    async def after(change: str | None, events: int) -> set[str]:
        if change is None:
            path.unlink()
        else:
            # Written anew and renamed, as configuration management does, and then in place.
            (tmp_path / "new").write_text(change)
            os.replace(tmp_path / "new", path)
        async with asyncio.timeout(5):
            while len(logged) < events:
                await asyncio.sleep(0.01)
        return {key for key in ("one", "two", "three") if ring.find([key])}

    assert await after("alice: two\nbob: three", 1) == {"two", "three"}
    assert logged[-1] == ("keys_changed", {"added": ["bob"], "removed": []})
    for number, broken in enumerate(("alice: [", "", None), 2):
        assert await after(broken, number) == {"two", "three"}
        event, fields = logged[-1]
        assert event == "keys_file_refused" and "two" not in str(fields)
    assert await after("carol: one", 5) == {"one"}
    assert logged[-1][1] == {"added": ["carol"], "removed": ["alice", "bob"]}
    await asyncio.sleep(0.1)
    assert len(logged) == 5  # each change is told once
    watching.cancel()
