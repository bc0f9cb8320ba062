"""Test that a GGUF file computes what transformers makes of it, with its blocks kept."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from quire.engine.body.body import HfBody
from quire.engine.body.grouped_linear import GroupedLinear
from quire.engine.body.grouped_rows import GroupedEmbedding, GroupedStack
from quire.engine.checkpoints import source
from quire.engine.checkpoints.checkpoint import open_checkpoint
from quire.engine.checkpoints.gguf_header import read_header
from quire.engine.config import EngineConfig
from quire.engine.devices.cpu.backend import CpuBackend
from quire.engine.devices.cpu.packed_embedding import pack_embeddings
from quire.engine.devices.cpu.packed_linear import pack_linears
from quire.engine.errors import ModelLoadError, UnsupportedModelError
from quire.engine.model.assemble import assemble
from quire.engine.model.causal_lm import CausalLM

from ..devices.cuda_on_cpu import CudaOnCpuBackend
from ..models import generate
from ..rounding import round_inputs
from ..worker_driver import Driver, load, make_config, make_sequence
from .gguf_files import CONFIGS, write_model

PROMPT = [5, 80, 17, 33, 64, 9, 110, 7]
CASES = [
    ("llama", "F32"),
    ("llama", "F16"),
    ("llama", "Q8_0"),
    ("llama", "Q4_K"),
    ("llama-tied", "Q4_0"),
    ("llama", "Q4_1"),
    ("qwen2", "Q4_1"),
    ("qwen2", "Q5_0"),
    ("qwen2", "Q6_K"),
    ("qwen3", "Q8_0"),
    ("qwen3", "Q4_0"),
    ("gemma2", "Q4_0"),
    ("gemma3", "Q8_0"),
]


class PlainBackend(CpuBackend):
    """A CPU that runs all layers as they are, so that nothing is rounded."""

    def make_body(self, body: Any, head: Any, flat: Any, **_: Any) -> Any:
        return HfBody(body)


class DenseBackend(CudaOnCpuBackend):
    """A device that knows no grouped products."""

    @property
    def multiplies_groups(self) -> bool:
        return False


def reference(file: Path) -> Any:
    """Return what transformers loads from the file, dequantised."""
    return AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()


def assembled(file: Path, *, keep_rows: bool = False) -> Any:
    """Return the transformers model that quire makes of the file, with its blocks kept."""
    checkpoint = open_checkpoint(make_config(file))
    assert checkpoint is not None and checkpoint.load_arguments is None
    config = checkpoint.hf_config()

    def build() -> Any:
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )

    made = assemble(checkpoint, build, torch.float32, keep_groups=True, keep_rows=keep_rows)
    return made.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([PROMPT]), use_cache=False).logits[0]
    return found


def num_grouped(model: CausalLM | Any) -> int:
    return sum(isinstance(module, GroupedLinear) for module in model.modules())


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_logits_and_text_are_those_of_transformers(tmp_path: Path, family: str, kind: str) -> None:
    file = tmp_path / "tiny.gguf"
    write_model(file, family, kind)
    expected = reference(file)
    for keep_rows in (False, True):
        model = assembled(file, keep_rows=keep_rows)
        torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-4)
        kept = 0 if kind.startswith("F") else 2 * 7 + 1
        assert num_grouped(model) == kept
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, GroupedEmbedding) == (keep_rows and kept > 0)
        head = model.get_output_embeddings()
        if keep_rows and kept and model.config.tie_word_embeddings:
            assert head.grouped.quants is embedding.grouped.quants
    config = make_config(file, dtype="float32")
    driver = Driver.start(config, PlainBackend())
    [tokens] = driver.run([make_sequence(PROMPT, 8)])
    assert tokens == generate(expected, PROMPT, 8)


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen3moe"])
def test_a_float_file_is_the_model_that_was_written(tmp_path: Path, family: str) -> None:
    file = tmp_path / "tiny.gguf"
    written = write_model(file, family)
    torch.testing.assert_close(logits(assembled(file)), logits(written), rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep_rows", [False, True])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_experts_stay_in_blocks_on_devices_that_multiply_them(
    tmp_path: Path, kind: str, keep_rows: bool
) -> None:
    file = tmp_path / "tiny.gguf"
    write_model(file, "qwen3moe", kind)
    model = assembled(file, keep_rows=keep_rows)
    torch.testing.assert_close(logits(model), logits(reference(file)), rtol=0, atol=1e-4)
    assert num_grouped(model) == 2 * 4 + 1
    experts = model.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        assert isinstance(getattr(experts, name), GroupedStack) == keep_rows


def test_facts_name_formats_and_count_kept_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tiny.gguf"
    written = write_model(file, "llama-tied", "Q4_0")
    with caplog.at_level(logging.INFO):
        facts = load(file).weights
    assert facts.source_format == "GGUF Q4_0"
    assert facts.computed_format == "4-bit groups, float32"
    assert facts.num_parameters == written.num_parameters()
    embedding = 128 * 256
    matrices = written.num_parameters() - embedding - 5 * 256
    # 4 bits, and a scale of 16 for each group of 32; the embedding and its tied head are one.
    assert facts.num_bytes == (matrices + embedding) * 9 // 16 + 4 * 5 * 256
    assert "Q4_0 kept in blocks" in caplog.text and "Q4_0 made dense" not in caplog.text


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama-tied", "Q4_0"),
        ("llama", "Q4_K"),
        ("llama-tied", "Q6_K"),
        ("gemma3", "Q8_0"),
        ("qwen3moe", "Q4_1"),
    ],
)
def test_the_cpu_computes_with_blocks(tmp_path: Path, family: str, kind: str) -> None:
    """The oracle rounds the inputs of products in the same way. What is left is inputs that a
    float's last bit rounds otherwise, if there are any."""
    file = tmp_path / "tiny.gguf"
    write_model(file, family, kind)
    driver = Driver.start(make_config(file, dtype="float32"))
    sequence = make_sequence(PROMPT, 1, logprobs=128)
    driver.run([sequence])
    [entry] = driver.logprobs[sequence.seq_id]
    found = torch.empty(128)
    found[list(entry.top_token_ids)] = torch.tensor(entry.top_logprobs)
    model = assembled(file)
    round_inputs(model)
    exact = logits(model)[-1].log_softmax(dim=-1)
    assert (found - exact).norm() < 0.002 * (exact - exact.mean()).norm()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q5_1", "Q6_K", "Q8_0", "Q3_K"])
@pytest.mark.parametrize("family", ["llama-tied", "gemma3"])
def test_an_embedding_is_looked_up_in_the_panels_of_its_head(
    tmp_path: Path, family: str, kind: str
) -> None:
    file = tmp_path / "tiny.gguf"
    write_model(file, family, kind)
    model = assembled(file, keep_rows=True)
    ids = torch.tensor([[0, 5], [127, 32]])
    given = model.get_input_embeddings()
    expected, weight = given(ids), given.weight
    [packed] = pack_embeddings(model.base_model).values()
    pack_linears(model, embeddings=[packed])
    assert (
        model.get_output_embeddings().packed is packed.packed and given.grouped.quants.numel() == 0
    )
    torch.testing.assert_close(packed(ids), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(packed.weight, weight)


def test_a_device_without_grouped_products_gets_dense_weights(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_model(file, "llama", "Q4_0")
    config = make_config(file)
    driver = Driver.start(config, DenseBackend())
    assert driver.worker._model.weights.computed_format == "float32"
    [tokens] = driver.run([make_sequence(PROMPT, 8)])
    assert tokens == generate(reference(file), PROMPT, 8)


def test_rotary_factors_of_the_file_are_applied(tmp_path: Path) -> None:
    from transformers.models.llama import LlamaConfig

    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    plain = CONFIGS["llama"][1]()
    scaled = LlamaConfig(**plain.to_dict() | {"rope_parameters": rope})
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    factors = LlamaRotaryEmbedding(plain).inv_freq / LlamaRotaryEmbedding(scaled).inv_freq
    assert factors.max() == pytest.approx(8) and factors.min() == pytest.approx(1)
    file = tmp_path / "tiny.gguf"
    written = write_model(file, "llama", rope_freqs=factors)
    written.config.rope_parameters = rope
    written.model.rotary_emb = LlamaRotaryEmbedding(written.config)
    torch.testing.assert_close(logits(assembled(file)), logits(written), rtol=0, atol=1e-4)


SCALING = {
    "linear": {"rope_type": "linear", "factor": 8.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", SCALING)
def test_rotary_scaling_of_the_file_is_applied(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "tiny.gguf"
    scaling = SCALING[kind]
    metadata = {"rope.scaling.type": kind, "rope.scaling.factor": scaling["factor"]}
    if kind == "yarn":
        metadata["rope.scaling.original_context_length"] = 64
    written = write_model(file, "llama", **metadata)
    config: Any = written.config
    config.rope_parameters |= scaling
    scaled = type(written)(config).eval()
    scaled.load_state_dict(written.state_dict())
    torch.testing.assert_close(logits(assembled(file)), logits(scaled), rtol=0, atol=1e-5)
    assert (logits(written) - logits(scaled)).abs().max() > 0.01


def test_only_layers_of_gemma_3_that_attend_to_all_tokens_are_scaled(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_model(file, "gemma3", **{"rope.scaling.type": "linear", "rope.scaling.factor": 8.0})
    checkpoint = open_checkpoint(make_config(file))
    assert checkpoint is not None
    rope = checkpoint.hf_config().rope_parameters
    assert (rope["full_attention"]["rope_type"], rope["full_attention"]["factor"]) == ("linear", 8)
    assert rope["sliding_attention"]["rope_type"] == "default"


@pytest.mark.parametrize(
    ("family", "metadata"),
    [
        ("phi3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}),
        ("gemma3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}),
        ("llama", {"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}),
        (
            "llama",
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.other": 1.0},
        ),
        ("phi3", {"rope_freqs": torch.ones(32)}),
    ],
)
def test_rotary_scaling_that_is_not_computed_is_refused(
    tmp_path: Path, family: str, metadata: dict[str, Any]
) -> None:
    file = tmp_path / "tiny.gguf"
    write_model(file, family, **metadata)
    with pytest.raises(UnsupportedModelError, match="rotary"):
        load(file)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"expert_count": 4}, "experts are not supported"),
        ({"attention.sliding_window": 16}, "sliding window is not supported"),
        ({"attention.key_length": 32}, "heads of 32 in K"),
        ({"rope.dimension_count": 32}, "32 rotated"),
        ({"attention.head_count": 0}, "no attention heads"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "not a positive number"),
        ({"embedding_length": 512}, "shape"),
        ({"feed_forward_length": 2**31 - 1}, "feed_forward_length is"),
        ({"attention.key_length": 2**30}, "key_length is"),
        ({"block_count": 3}, "states 3 layers"),
        ({"block_count": 1}, "no place"),
        ({"block_count": 2**30}, "layers"),
        ({"block_count": 0}, "no layers"),
        ({"attention.head_count_kv": 3}, "shape|heads"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(
    tmp_path: Path, metadata: dict[str, Any], reason: str
) -> None:
    file = tmp_path / "tiny.gguf"
    write_model(file, "llama", **metadata)
    began = time.monotonic()
    with pytest.raises((ModelLoadError, UnsupportedModelError), match=reason):
        load(file)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "F32"), ("llama", "F16"), ("llama", "Q4_0"), ("llama", "Q4_K"), ("phi3", "Q8_0")],
)
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, family: str, kind: str) -> None:
    file = tmp_path / "tiny.gguf"
    write_model(file, family, kind)
    tensor = read_header(file).tensors["blk.1.ffn_down.weight"]
    data = bytearray(file.read_bytes())
    data[tensor.offset : tensor.offset + 4] = b"\x00\x7e\xc0\x7f"  # NaN as float16 or float32
    file.write_bytes(data)
    with pytest.raises(ModelLoadError, match=r"1\..*down.*weight has numbers that are not"):
        load(file)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    write_model(file, "llama")
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedModelError, match=r"pip install 'quire-server\[gguf\]'"):
        open_checkpoint(EngineConfig(model=str(file)))


def test_another_family_is_loaded_by_transformers(tmp_path: Path) -> None:
    """Phi 3 has Q, K and V in one tensor."""
    file = tmp_path / "tiny.gguf"
    write_model(file, "phi3", "Q8_0")
    checkpoint = open_checkpoint(make_config(file))
    assert checkpoint is not None and checkpoint.load_arguments is not None
    driver = Driver.start(make_config(file, dtype="float32"))
    assert driver.worker._model.weights.computed_format == "float32"
    [tokens] = driver.run([make_sequence(PROMPT, 8)])
    assert tokens == generate(reference(file), PROMPT, 8)


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    import gguf

    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "not-a-family")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="family 'not-a-family' is not known"):
        load(file)
