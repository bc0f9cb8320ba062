"""Test the page at / and its files as a browser's security and cache see them."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from ...documents import ROOT
from ..conftest import MakeClient

FOLDER = ROOT / "server/web"
MAX_BYTES = 200_000


def loaded(page: str) -> list[str]:
    """Return what the page loads, as relative addresses."""
    return re.findall(r'(?:src|href)="(web/[^"]+)"', page)


async def fetch_all(client: httpx.AsyncClient) -> dict[str, httpx.Response]:
    """Return the page and all that it loads, imports of imports included, by address."""
    found = {"": await client.get("/")}
    todo = loaded(found[""].text)
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found[path] = await client.get(f"/{path}")
        folder = path.rpartition("/")[0]
        names = re.findall(r'from "\./([\w.]+)"', found[path].text)
        todo += [f"{folder}/{name}" for name in names]
    return found


async def test_the_page_and_all_that_it_loads_is_served_and_small(
    client: httpx.AsyncClient,
) -> None:
    found = await fetch_all(client)
    assert {response.status_code for response in found.values()} == {200}
    names = {path.rpartition("/")[2] for path in found if path}
    kinds = {".js", ".css", ".svg"}
    assert names == {path.name for path in FOLDER.iterdir() if path.suffix in kinds}
    assert sum(len(response.content) for response in found.values()) <= MAX_BYTES
    types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", "": "text/html"}
    for path, response in found.items():
        kind = types[Path(path).suffix]
        assert response.headers["content-type"].split(";")[0] == kind, path


async def test_nothing_is_loaded_from_elsewhere(client: httpx.AsyncClient) -> None:
    for path, response in (await fetch_all(client)).items():
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy and "://" not in policy and "*" not in policy, path
        assert response.headers["x-content-type-options"] == "nosniff"
        if path.endswith(("svg", "preact.js")):
            continue  # names of XML's namespaces
        assert "://" not in response.text, path
    page = (await client.get("/")).text
    # The policy forbids scripts and styles within the page.
    assert not re.search(r"<style|\son\w+=|\sstyle=|<script>", page)


async def test_files_are_cached_for_ever_and_the_page_is_revalidated(
    client: httpx.AsyncClient,
) -> None:
    page = await client.get("/")
    assert page.headers["cache-control"] == "no-cache"
    again = await client.get("/", headers={"if-none-match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert "content-security-policy" in again.headers
    other = await client.get("/", headers={"if-none-match": '"other"'})
    assert other.content == page.content
    for path in loaded(page.text):
        response = await client.get(f"/{path}")
        assert response.headers["cache-control"] == "public, max-age=31536000, immutable"


@pytest.mark.parametrize(
    "path",
    [
        *("/web/{version}/index.html", "/web/{version}/__init__.py", "/web/{version}/licences.txt"),
        *("/web/{version}/..%2fdocs.html", "/web/{version}/none.js", "/web/other/app.js"),
    ],
)
async def test_only_the_files_of_this_version_are_served(
    client: httpx.AsyncClient, path: str
) -> None:
    version = loaded((await client.get("/")).text)[0].split("/")[1]
    assert (await client.get(path.replace("{version}", version))).status_code == 404


@pytest.mark.parametrize(
    ("root", "base"), [("", "/"), ("/llm", "/llm/"), ("a/b/", "/a/b/"), ('/"><b>', None)]
)
async def test_addresses_start_at_the_prefix_of_a_proxy(
    make_client: MakeClient, root: str, base: str | None
) -> None:
    page = (await make_client(root_path=root).get("/")).text
    (found,) = re.findall(r'<base href="([^"]*)">', page)
    assert found == (base or "/&quot;&gt;&lt;b&gt;/")


async def test_the_page_loads_without_a_key_and_knows_nothing(make_client: MakeClient) -> None:
    locked = make_client(api_key=("secret",), admin_api_key="boss", served_model_name=("acme-7b",))
    found = await fetch_all(locked)
    assert {response.status_code for response in found.values()} == {200}
    assert "acme-7b" not in "".join(response.text for response in found.values())


async def test_the_licences_of_what_is_vendored_are_shipped() -> None:
    text = (FOLDER / "licences.txt").read_text(encoding="utf-8")
    assert "Apache License" in text and "The MIT License (MIT)" in text and "preact.js" in text
