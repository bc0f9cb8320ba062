"""Plain-torch reference of a mixture of experts; see reference.py for its conventions.

Source: the sparsely gated mixture (arXiv 1701.06538) of SwiGLU experts, as in Mixtral (arXiv
2401.04088), and the clamped gate of gpt-oss (arXiv 2508.10925).
"""

import torch


def run_experts(
    input: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    clamp: tuple[float, float] | None = None,
    config: object = None,
) -> torch.Tensor:
    """Return Σ_j weights[t, j] · expert_{chosen[t, j]}(input[t]) for each token t.

    input is `[num_tokens, hidden_size]`, chosen and weights are `[num_tokens, top_k]`. An expert is
    down · gated(gate · x, up · x), each product with its bias: gate_up is `[num_experts, 2 * size,
    hidden_size]`, gate first, and down `[num_experts, hidden_size, size]`. gated(g, u) is
    silu(g) · u; with `clamp` (limit, alpha) it is g · sigmoid(alpha · g) · (u + 1), after g has
    been limited from above and u on both sides. `config` is unused here.
    """
    wide = input.dtype if input.dtype == torch.float64 else torch.float32
    total = torch.zeros(input.shape, dtype=wide, device=input.device)
    for expert in range(len(gate_up)):
        tokens, places = (chosen == expert).nonzero(as_tuple=True)
        inner = input[tokens].to(wide) @ gate_up[expert].T.to(wide)
        if gate_up_bias is not None:
            inner += gate_up_bias[expert].to(wide)
        gate, up = inner.chunk(2, dim=-1)
        alpha = 1.0
        if clamp is not None:
            limit, alpha = clamp
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1
        outer = (gate * torch.sigmoid(alpha * gate) * up) @ down[expert].T.to(wide)
        if down_bias is not None:
            outer += down_bias[expert].to(wide)
        total.index_add_(0, tokens, outer * weights[tokens, places, None].to(wide))
    return total.to(input.dtype)
