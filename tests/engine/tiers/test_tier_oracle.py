"""Compare the whole engine with transformers while its conversations evict each other to host
memory and to disk: the tokens are those of `generate`, whatever went there and came back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.engine.devices.backend import Backend
from quire.engine.errors import ConfigurationError
from quire.engine.speculation.model import ModelDrafter
from quire.engine.speculation.speculator import Speculator
from quire.engine.tiers import readmission

from .. import latent_models, models
from ..devices.cuda_on_cpu import CudaOnCpuBackend
from ..speculation.drafters import FreeDrafts
from ..test_oracle import Engine, Reference
from .stores import Tasks

BLOCK_BYTES = 16 * 2 * 2 * 2 * 8 * 4  # tokens, layers, K and V, heads, width, float32
LITTLE, MANY = 24 * BLOCK_BYTES, 6
"""Host memory that holds less than so many conversations."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Reference]]:
    folder = tmp_path_factory.mktemp("llama")
    yield folder, Reference(models.save_model("llama", folder))


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sequences wait for the disk of a machine that is busy with something else."""
    monkeypatch.setattr(readmission, "MIN_WAIT", 20.0)
    monkeypatch.setattr(readmission, "DEFAULT_WAIT", 20.0)


def engine(folder: Path, size: int | None, backend: Backend | None = None, **config: Any) -> Engine:
    """Return an engine whose cache has room for one conversation. What is kept elsewhere is
    always loaded, however fast this machine computes."""
    values = {"num_blocks": 12, "max_num_batched_tokens": 48, "kv_offloading_size": size}
    made = Engine(folder, backend, **values | config)
    tier = made.core._tier
    assert tier is not None
    tier.cost.observe_step = lambda tokens, seconds: None  # type: ignore[method-assign]
    if tier.lower is not None:  # no block is lost because the disk is busy
        tier.lower._write = Tasks(slow=False)
    return made


def conversations(count: int = 3, turns: int = 3) -> list[list[list[int]]]:
    """Return the prompts of each turn of some conversations; each prompt begins with the last."""
    rng = random.Random(3)
    made = []
    for _ in range(count):
        prompt: list[int] = []
        prompts = []
        for _ in range(turns):
            prompt = prompt + [rng.randrange(3, models.VOCAB_SIZE) for _ in range(45)]
            prompts.append(prompt)
        made.append(prompts)
    return made


def hold(made: Engine, reference: Reference, count: int = 3, **fields: Any) -> int:
    """Let conversations take turns, check the tokens, and return how many prompt tokens were found
    in a cache."""
    talks = conversations(count)
    for turn in range(len(talks[0])):
        for talk in talks:
            request = made.add(talk[turn], 8, **fields)
            made.run()
            for choice in range(request.sampling_params.n):
                assert made.tokens(request, choice) == reference.complete(talk[turn], 8)
    return made.core.stats().prefix_hits


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ahead": {"async_scheduling": True},
    "drafts": {"speculation": "ngram"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("below", [False, True], ids=["host", "disk"])
def test_tokens_equal_generate(
    llama: tuple[Path, Reference], tmp_path: Path, mode: str, below: bool
) -> None:
    folder, reference = llama
    size = LITTLE if below else 64 * BLOCK_BYTES
    disk = {"kv_offloading_disk": str(tmp_path)} if below else {}
    made = engine(folder, size, **MODES[mode] | disk)
    hits = hold(made, reference, MANY if below else 3)
    tiers = made.core.stats().tiers
    assert all(tier.stored > 0 and tier.loaded > 0 for tier in tiers) and len(tiers) == 1 + below
    # Of a host's memory that holds all, each turn finds what the turns before had computed.
    assert hits >= (100 if below else 3 * (32 + 80))
    made.core.close()


GROUPED = {
    "gemma3": models.FAMILIES["gemma3"],
    "gpt_oss": models.FAMILIES["gpt_oss"],
    "llama4": models.llama4,
}


@pytest.mark.parametrize("family", GROUPED)
@pytest.mark.parametrize("below", [False, True], ids=["host", "disk"])
def test_layers_with_windows_find_what_was_evicted(
    tmp_path: Path, family: str, below: bool
) -> None:
    """Layers in groups keep their blocks apart, in the cache and outside of it."""
    model = models.build_model(GROUPED[family]())
    model.save_pretrained(tmp_path)
    reference = Reference(model)
    disk = {"kv_offloading_disk": str(tmp_path / "kv")} if below else {}
    made = engine(tmp_path, 2**17 if below else 2**20, num_blocks=13, **disk)
    assert made.core._scheduler.block_manager.has_groups
    hits = hold(made, reference, MANY if below else 3)
    tiers = made.core.stats().tiers
    assert all(tier.stored > 0 and tier.loaded > 0 for tier in tiers)
    assert hits >= (100 if below else 3 * (32 + 80))
    made.core.close()


def test_latents_come_back(tmp_path: Path) -> None:
    model = latent_models.build("glm4_moe_lite")
    model.save_pretrained(tmp_path / "model")
    size = 16 * 2 * 48 * 4  # tokens, layers, numbers, float32
    made = engine(tmp_path / "model", 24 * size, kv_offloading_disk=str(tmp_path / "disk"))
    hold(made, Reference(model), MANY, n=2)
    host, disk = made.core.stats().tiers
    assert host.loaded > 0 and disk.loaded > 0 and host.block_bytes == size
    made.core.close()


def test_choices_and_preemptions_equal_generate(llama: tuple[Path, Reference]) -> None:
    folder, reference = llama
    made = engine(folder, 64 * BLOCK_BYTES)
    hold(made, reference, n=3)
    talks = [prompts[1] for prompts in conversations()]
    requests = [made.add(prompt, 60) for prompt in talks]
    made.run()
    for request, prompt in zip(requests, talks, strict=True):
        assert made.tokens(request) == reference.complete(prompt, 60)
    assert made.core.stats().preemptions > 0


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_logprobs_are_the_same_to_the_bit(
    llama: tuple[Path, Reference], kind: str, dtype: str
) -> None:
    """Blocks come back as they were, whatever their type; so does what is computed from them."""
    if kind == "cuda" and dtype != "float32":
        pytest.skip("works only on the CPU")
    folder, _ = llama
    logprobs = []
    for num_blocks in (12, 200):  # with evictions, and without any
        backend = CudaOnCpuBackend() if kind == "cuda" else None
        made = engine(
            folder, 64 * BLOCK_BYTES, backend, num_blocks=num_blocks, kv_cache_dtype=dtype
        )
        found = []
        for turn in range(3):
            for talk in conversations():
                request = made.add(talk[turn], 8, logprobs=3)
                made.run()
                outputs = made.outputs[request.request_id, 0]
                found += [one for output in outputs for one in output.logprobs or []]
        logprobs.append(found)
        (tier,) = made.core.stats().tiers
        assert (tier.loaded > 0) == (num_blocks == 12)
    assert len(logprobs[0]) == 72 and logprobs[0] == logprobs[1]


def test_a_draft_models_cache_comes_back_too(llama: tuple[Path, Reference]) -> None:
    folder, reference = llama
    made = engine(folder, 128 * BLOCK_BYTES, speculative_model=str(folder))
    drafting = made.core._scheduler._drafting
    assert drafting is not None
    drafting.speculator = Speculator(
        [], max_draft=7, max_samples=64, cost=FreeDrafts(), model=ModelDrafter()
    )
    hold(made, reference)
    stats = made.core.stats()
    assert stats.tiers[0].loaded > 0 and stats.tiers[0].block_bytes == 2 * BLOCK_BYTES
    # The draft model is the model itself, so all its guesses are right, if its own K/V is.
    assert stats.accepted_tokens == stats.draft_tokens > 0


def test_a_restart_finds_what_is_on_disk(llama: tuple[Path, Reference], tmp_path: Path) -> None:
    folder, reference = llama
    talk = conversations()[0]
    config = {"kv_offloading_disk": str(tmp_path)}
    made = engine(folder, LITTLE, **config)
    hold(made, reference, MANY)
    made.core.close()
    again = engine(folder, LITTLE, **config)
    assert again.complete(talk[2], 8) == reference.complete(talk[2], 8)
    assert again.core.stats().prefix_hits >= 80
    again.core.close()
    # Another type of K/V is another model's.
    other = engine(folder, LITTLE, kv_cache_dtype="float16", block_size=32, **config)
    other.complete(talk[2], 8)
    assert other.core.stats().prefix_hits == 0
    other.core.close()


def test_damaged_files_are_computed_anew(llama: tuple[Path, Reference], tmp_path: Path) -> None:
    folder, reference = llama
    talk = conversations()[0]
    config = {"kv_offloading_disk": str(tmp_path)}
    made = engine(folder, LITTLE, **config)
    hold(made, reference, MANY)
    made.core.close()
    files = list(tmp_path.rglob("*.kv"))
    assert files
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    again = engine(folder, LITTLE, **config)
    assert again.complete(talk[2], 8) == reference.complete(talk[2], 8)
    stats = again.core.stats()
    assert stats.prefix_hits == 0 and stats.tiers[1].failures > 0
    again.core.close()
    assert len(list(tmp_path.rglob("*.kv"))) < len(files) + 10


def test_what_cannot_be_had_is_refused(llama: tuple[Path, Reference], tmp_path: Path) -> None:
    folder, _ = llama
    for message, config in {
        "--kv-offloading-size is 100 bytes, but a block takes 4096": {"kv_offloading_size": 100},
        "GiB of memory are available": {"kv_offloading_size": 2**50},
        "--kv-offloading-size needs --enable-prefix-caching": {"enable_prefix_caching": False},
        "--kv-offloading-disk needs --kv-offloading-size": {
            "kv_offloading_size": None,
            "kv_offloading_disk": str(tmp_path),
        },
        "exclude one another": {
            "kv_offloading_disk": str(tmp_path),
            "kv_offloading_connector": "a:b",
        },
        "--kv-offloading-connector a.b cannot be made: .*MODULE:FUNCTION": {
            "kv_offloading_connector": "a.b"
        },
        "--kv-offloading-connector nowhere:make cannot be made": {
            "kv_offloading_connector": "nowhere:make"
        },
    }.items():
        with pytest.raises(ConfigurationError, match=message):
            engine(folder, **{"size": 2**20} | config)  # type: ignore[arg-type]


def test_a_connector_of_ones_own(llama: tuple[Path, Reference]) -> None:
    folder, reference = llama
    made = engine(folder, LITTLE, kv_offloading_connector="tests.engine.tiers.stores:make_store")
    hold(made, reference, MANY)
    tier = made.core.stats().tiers[1]
    assert tier.tier == "store" and tier.stored > 0 and tier.loaded > 0
    made.core.close()


def test_host_memory_is_words_or_bytes(llama: tuple[Path, Reference]) -> None:
    """A width that is no multiple of a word, such as int8's with its scale, is copied as bytes."""
    from quire.engine.devices.host_blocks import host_layout

    for width, word in ((16, torch.int64), (20, torch.uint8)):
        cache = torch.zeros(2, 2, 3, 1, 16, width, dtype=torch.int8)
        memory = memoryview(bytearray(5 * 2 * 2 * 16 * width + 3))
        layout = host_layout([cache], memory)
        assert layout.slots.dtype == word and len(layout.slots) == 5
