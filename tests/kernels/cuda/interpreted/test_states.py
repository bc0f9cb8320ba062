"""Compare the kernels of layers that keep a state with the reference: 2e-6 (float32), 1e-3
(float16), 1e-2 (bfloat16)."""

import pytest
import torch
import torch.nn.functional as F
from paged import relative_error
from state_steps import HEADS, STEPS, WIDTHS, StateStep, convolution, recurrence, state_step

from quire.kernels import reference_states
from quire.kernels.cuda.states.causal_conv import causal_conv
from quire.kernels.cuda.states.gated_recurrence import gated_recurrence

TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", STEPS)
def test_causal_conv(dtype: torch.dtype, width: tuple[int, int, bool], rows: str) -> None:
    step = state_step(*STEPS[rows])
    channels, taps, has_bias = width
    have = convolution(step, channels, taps, dtype, has_bias=has_bias)
    x, weight, bias, states = have._replace(states=have.states.clone())
    found = causal_conv(*have, *step)
    wide = bias if bias is None else bias.double()
    expected = reference_states.causal_conv(x.double(), weight.double(), wide, states, *step)
    assert relative_error(found, expected) < TOLERANCES[dtype]
    assert torch.equal(have.states, states)  # inputs, which are only moved


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("rows", STEPS)
@pytest.mark.parametrize("rule", ["delta", "sum"])
def test_gated_recurrence(
    dtype: torch.dtype, heads: tuple[int, int, int, int], rows: str, rule: str
) -> None:
    step, is_delta = state_step(*STEPS[rows]), rule == "delta"
    have = recurrence(step, heads, dtype, has_beta=is_delta)
    options = {"scale": 0.3 if is_delta else 1.0, "normalise": is_delta}
    wide = [None if tensor is None else tensor.double() for tensor in have]
    found = gated_recurrence(*have, *step, **options)
    expected = reference_states.gated_recurrence(*wide, *step, **options)
    assert relative_error(found, expected) < TOLERANCES[dtype]
    assert wide[-1] is not None
    assert relative_error(have.states, wide[-1]) < 2e-6


def test_padding_of_a_captured_step_gets_zeros() -> None:
    """Tokens after the last row, and rows without tokens, change nothing."""
    step = state_step(*STEPS["mixed"])
    taps = convolution(step, 70, 4, torch.float32, has_bias=True)
    gates = recurrence(step, (2, 4, 8, 12), torch.float32, has_beta=True)
    more = F.pad(step.query_start_loc, (0, 2), value=step.num_tokens)
    nothing = torch.full((20,), -1, dtype=torch.int32)
    padded = StateStep(
        torch.cat([step.slots, nothing]),
        torch.cat([step.saves, nothing]),
        more,
        F.pad(step.seq_lens, (0, 2)),
    )
    wide = [tensor if tensor is None else tensor.clone() for tensor in (*taps, *gates)]
    x, weight, bias, states = taps
    found = causal_conv(torch.cat([x, x[:9]]), weight, bias, states, *padded)
    longer = [F.pad(tensor, (0, 0, 0, 0, 0, 9)) for tensor in gates[:3]]
    gated = [F.pad(tensor, (0, 0, 0, 9), value=1.0) for tensor in (gates.log_decay, gates.beta)]
    options = {"scale": 0.3, "normalise": True}
    read = gated_recurrence(*longer, *gated, gates.states, *padded, **options)
    for have, want in (
        (found, reference_states.causal_conv(*wide[:4], *step)),
        (read, reference_states.gated_recurrence(*wide[4:], *step, **options)),
    ):
        assert relative_error(have[: step.num_tokens], want) < 2e-6
        assert not have[step.num_tokens :].any()
    assert torch.equal(states, wide[3])
    assert relative_error(gates.states, wide[-1]) < 2e-6


def test_what_does_not_fit_is_refused() -> None:
    step = state_step([2], [0])
    x, weight, bias, states = convolution(step, 8, 4, torch.float32, has_bias=True)
    for arguments, message in (
        ((x, weight[:, :3], bias, states), "states must have shape"),
        ((x, weight, bias, states.double()), "states must be one of"),
        ((x.double(), weight, bias, states), "x must be one of"),
        ((x[:, :7], weight, bias, states), "weight must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            causal_conv(*arguments, *step)
    with pytest.raises(ValueError, match="slots for 1 rows"):
        causal_conv(x, weight, bias, states, step.slots[:0], *step[1:])
    have = recurrence(step, (2, 4, 8, 12), torch.float32, has_beta=True)
    options = {"scale": 1.0, "normalise": True}
    with pytest.raises(ValueError, match="do not share"):
        three = have._replace(value=have.value[:, :3])
        gated_recurrence(*three, *step, **options)
    with pytest.raises(ValueError, match="decay must be one of"):
        gated_recurrence(*have._replace(log_decay=have.log_decay.double()), *step, **options)
