"""Compare LoRA adapters on the CUDA path, with its Triton kernels, with PEFT on small models."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.engine.devices.cuda.layers.adapters import CudaSlots
from quire.engine.lora import AdapterSource
from quire.kernels.cuda.attention import decode_schedule

from ...lora_models import save_adapter
from ...models import FAMILIES, build_model, generate, not_flat
from ...test_oracle import Engine
from ..cuda_on_cpu import interpreted


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", "not flat"])
def test_a_mixed_batch_equals_peft(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two bodies are flat, with merged products, one of them beside experts; one runs as
    transformers' code. Decodes replay graphs, with adapters and without."""
    monkeypatch.setattr(decode_schedule, "DEFAULT_NUM_SMS", 2)
    base = build_model(not_flat() if family == "not flat" else FAMILIES[family]())
    base.save_pretrained(tmp_path / "base")
    configs = {"few": ["q_proj", "o_proj"], "all": r".*\.(self_attn|mlp)\..*_proj"}
    models = {None: base} | {
        name: save_adapter(base, tmp_path / name, seed=rank, r=rank, target_modules=targets)
        for rank, (name, targets) in zip((3, 20), configs.items(), strict=True)
    }
    sources = tuple(AdapterSource(name, str(tmp_path / name)) for name in configs)
    backend = interpreted(sizes=[1, 2, 4])
    engine = Engine(
        tmp_path / "base", backend, enable_lora=True, lora=sources, max_loras=2, max_num_seqs=4,
        max_num_batched_tokens=16, num_blocks=16, max_model_len=64,
    )  # fmt: skip
    assert isinstance(engine.worker._adapters.slots, CudaSlots)
    prompts = {None: [5, 9, 33, 71, 80], "few": [4, 17, 5], "all": list(range(20, 38))}
    requests = [engine.add(prompt, 4, adapter=name) for name, prompt in prompts.items()]
    engine.run()
    for request in requests:
        expected = generate(models[request.adapter], list(request.prompt_token_ids), 4)
        assert engine.tokens(request) == expected, request.adapter
    assert backend.reruns.num_replays
