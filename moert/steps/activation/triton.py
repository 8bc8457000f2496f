"""The activations inside a Triton kernel: float32 in, float32 out."""

import triton
import triton.language as tl


@triton.jit
def activate(
    gate,
    up,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
):
    """The intermediate of an expert, as `activate_reference` defines it.

    Args:
        gate, up: float32 blocks of one shape; `gate` is ignored if GATED is False (pass `up`).
        ACTIVATION: one of `moert.config.ACTIVATIONS`.
        LIMIT: clamp of gate (from above) and up (both sides); 0.0 for none.
        ALPHA: the slope inside swiglu_oai's sigmoid.

    A NaN stays a NaN: the clamps are comparisons, where minimum and maximum would drop it.
    """
    # one branch a case: code after a return of a constant `if` would still be compiled
    if not GATED:
        h = _act(up, ACTIVATION)
    else:
        if LIMIT > 0.0:
            gate = tl.where(gate > LIMIT, LIMIT, gate)
            up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        if ACTIVATION == "swiglu_oai":
            h = (up + 1.0) * (gate / (1.0 + tl.exp(-ALPHA * gate)))
        else:
            h = _act(gate, ACTIVATION) * up
    return h


@triton.jit
def _act(x, ACTIVATION: tl.constexpr):
    # x / (1 + exp(-x)) needs no guard: exp overflows to inf and the quotient to -0
    tl.static_assert(
        ACTIVATION == "silu"
        or ACTIVATION == "gelu"
        or ACTIVATION == "gelu_tanh"
        or ACTIVATION == "relu2",
        "unknown activation",
    )
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) is sigmoid(2z): no tanh, which is not portable, and no cancellation
        z2 = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        y = x / (1.0 + tl.exp(-z2))
    else:
        positive = tl.where(x < 0.0, 0.0, x)
        y = positive * positive
    return y
