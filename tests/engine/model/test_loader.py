"""Test what the loader reads, refuses and derives."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v32 import DeepseekV32Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.jamba import JambaConfig
from transformers.models.llama import LlamaConfig
from transformers.models.llama4 import Llama4TextConfig
from transformers.models.mamba import MambaConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.t5 import T5Config

from quire.engine.config import EngineConfig
from quire.engine.errors import ConfigurationError, ModelLoadError, UnsupportedModelError
from quire.engine.model.loader import load_model
from quire.engine.model.model_spec import ModelSpec, read_hf_config, spec_from_hf_config

from ..devices.cuda_on_cpu import CudaOnCpuBackend
from ..models import COMMON, FAMILIES, WINDOW, build_model, generate, logprobs, save_model
from ..worker_driver import Driver, load, make_config, make_sequence


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_model("llama", tmp_path)
    return tmp_path


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def read_spec(folder: Path) -> ModelSpec:
    config = make_config(folder)
    return spec_from_hf_config(read_hf_config(config), config)


def test_spec_is_read_without_weights(tmp_path: Path) -> None:
    FAMILIES["gemma3"]().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    spec = read_spec(tmp_path)
    assert spec.windows == (WINDOW, WINDOW, None)
    assert (spec.num_layers, spec.num_attention_heads, spec.num_kv_heads) == (3, 4, 2)
    assert (spec.head_dim, spec.vocab_size, spec.max_position) == (16, 128, 256)
    assert spec.eos_token_ids == (2, 7)
    assert spec.kv_bytes_per_token(4) == 2 * 3 * 2 * 16 * 4


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 1024),
        ({"rope_type": "dynamic", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            256,
        ),
    ],
)
def test_max_position_counts_rope_scaling(
    tmp_path: Path, rope: dict[str, Any], expected: int
) -> None:
    LlamaConfig(**COMMON, rope_parameters={"rope_theta": 10000.0} | rope).save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    assert spec.max_position == expected
    assert spec.resolve_max_model_len(None) == expected
    with pytest.raises(ConfigurationError, match="max_model_len"):
        spec.resolve_max_model_len(expected + 1)


def test_dummy_weights_have_the_shape_and_follow_the_seed(tmp_path: Path) -> None:
    FAMILIES["qwen3"]().save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    first, again, other = (load(tmp_path, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.num_parameters == build_model(FAMILIES["qwen3"]()).num_parameters()
    hidden = torch.ones(1, 32)
    assert torch.equal(first.logits(hidden), again.logits(hidden))
    assert not torch.equal(first.logits(hidden), other.logits(hidden))


def test_dtype_is_resolved(llama: Path) -> None:
    edit_config(llama, dtype="bfloat16")
    assert load(llama).dtype == torch.float32
    assert load(llama, dtype="bfloat16").dtype == torch.bfloat16


def test_a_missing_gpu_is_refused(llama: Path) -> None:
    if torch.cuda.is_available():
        assert load(llama, device="cuda").device.type == "cuda"
        return
    with pytest.raises(ConfigurationError, match="no GPU"):
        load(llama, device="cuda")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2),
            "linear_attention|state",
        ),
        (T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2), "encoder-decoder"),
        (JambaConfig(**COMMON, attn_layer_offset=1), "keep a state of a kind"),
        (Llama4TextConfig(**COMMON, attention_chunk_size=None), "attention_chunk_size is None"),
        (
            DeepseekV32Config(**COMMON | {"num_key_value_heads": 4}),
            "its indexer chooses which tokens are attended to",
        ),
        (
            Gemma3TextConfig(**COMMON, head_dim=16, use_bidirectional_attention=True),
            "later tokens",
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_models_that_cannot_work_are_refused(tmp_path: Path, config: Any, reason: str) -> None:
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        load(tmp_path, load_format="dummy")
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith(type(config).__name__.removesuffix("Config"))


def test_a_model_that_drops_keyword_arguments_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def forgetful(self: Any, *args: Any, attn_metadata: Any = None, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forgetful)
    with pytest.raises(UnsupportedModelError, match="keyword arguments do not reach"):
        load(llama)


def test_a_window_on_which_code_and_configuration_disagree_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model("qwen3", tmp_path)
    layer_types = ["full_attention", "sliding_attention"]
    edit_config(tmp_path, layer_types=layer_types, use_sliding_window=True, sliding_window=24)
    assert load(tmp_path).spec.windows == (None, 24)
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    original = Qwen3Attention.__init__

    def windowless(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.sliding_window = None

    monkeypatch.setattr(Qwen3Attention, "__init__", windowless)
    with pytest.raises(UnsupportedModelError, match="layer 1 attends with window None"):
        load(tmp_path)


def check_one_line(folder: Path, match: str) -> None:
    with pytest.raises(ModelLoadError, match=match) as caught:
        load(folder)
    assert "\n" not in caught.value.message
    assert str(folder) in caught.value.message


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_no_weight_file_stays_mapped(family: str, tmp_path: Path) -> None:
    save_model(family, tmp_path)
    model = load(tmp_path)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert model.num_parameters > 0


def test_a_truncated_weight_file_is_an_error(llama: Path) -> None:
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    check_one_line(llama, "(?i)incomplete|buffer")


def test_garbage_in_place_of_weights_is_an_error(llama: Path) -> None:
    (llama / "model.safetensors").write_bytes(b"\xff" * 1000)
    check_one_line(llama, "(?i)header")


def test_missing_and_misshapen_tensors_are_errors(llama: Path) -> None:
    edit_config(llama, num_hidden_layers=3)
    check_one_line(llama, "9 missing keys, the first model.layers.2")
    edit_config(llama, num_hidden_layers=2, intermediate_size=48)
    check_one_line(llama, "(?i)mismatch")


def test_broken_json_is_an_error(llama: Path) -> None:
    generation = (llama / "generation_config.json").read_text()
    (llama / "generation_config.json").write_text("{")
    check_one_line(llama, "generation_config.json")
    (llama / "generation_config.json").write_text(generation)
    (llama / "config.json").write_text("{")
    check_one_line(llama, "configuration")


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    check_one_line(tmp_path, "configuration")


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickled_weights_are_never_read(llama: Path, tmp_path: Path) -> None:
    (llama / "model.safetensors").unlink()
    trace = tmp_path / "executed"
    (llama / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(trace)))
    check_one_line(llama, "safetensors")
    assert not trace.exists()


def test_code_in_the_folder_is_never_executed(llama: Path, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    (llama / "evil.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\n")
    edit_config(
        llama,
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    check_one_line(llama, "--trust-remote-code")
    edit_config(llama, model_type="llama")  # a known type: its own class is used instead
    load(llama)
    assert not trace.exists()


def make_longrope() -> Phi3Config:
    factors = [1.0 + 0.5 * index for index in range(4)]
    return Phi3Config(
        **COMMON,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": factors,
            "long_factor": [8 * factor for factor in factors],
        },
    )


@pytest.mark.filterwarnings("ignore")
def test_longrope_does_not_depend_on_other_rows(tmp_path: Path) -> None:
    model = build_model(make_longrope())
    model.save_pretrained(tmp_path)
    short, long = list(range(3, 23)), list(range(3, 93))
    served_short = Driver.start(make_config(tmp_path, max_model_len=64))
    assert served_short.run([make_sequence(short, 8)]) == [generate(model, short, 8)]

    served_long = Driver.start(make_config(tmp_path, max_model_len=200))
    alone = make_sequence(short, 8, logprobs=0)
    served_long.run([alone])
    beside = make_sequence(short, 8, logprobs=0)
    neighbour = make_sequence(long, 8, logprobs=0)
    served_long.run([neighbour, beside])
    assert beside.token_ids == alone.token_ids
    assert neighbour.token_ids[len(long) :] == generate(model, long, 8)
    # The long factors hold for short sequences too, which is not what the short ones give.
    entries = served_long.logprobs[alone.seq_id]
    reference = logprobs(model, alone.token_ids)[len(short) - 1, alone.token_ids[len(short)]]
    assert abs(entries[0].logprob - reference.item()) > 1e-3


def test_a_family_without_a_causal_model_is_refused(tmp_path: Path) -> None:
    from transformers.models.vit import ViTConfig

    assert ViTConfig not in AutoModelForCausalLM._model_mapping
    ViTConfig(hidden_size=32, num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="ViT"):
        load(tmp_path)


def test_an_unsupported_quantization_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigurationError, match="unknown quantization"):
        EngineConfig(model=str(llama), quantization="int3")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="int8 works only on the CPU"):
        load_model(make_config(llama, quantization="int8"), CudaOnCpuBackend())
