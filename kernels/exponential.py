"""exp and expm1 to about one ulp: `tl.exp` multiplies by log2 e in float32, which costs |x| ulp, and there is no expm1.

The arithmetic and the polynomials are those of csrc/cpu/vec_math.h: x = n ln 2 + r, e^r = 1 + r + r^2 Q(r).
Some dozen fused multiply-adds an element; a GPU's exponential units are no faster at full precision. Where the inputs
have 16 bits, and no difference of near results is taken, their 2 ulp are enough: FAST.
"""

import contextlib
import os

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.44269504088896341)
NEAR = tl.constexpr(0.7)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"))
if INTERPRETED.value:
    # else Triton imports it in the midst of a kernel, with `print` for `static_print`, which Python 3.10 cannot inspect
    with contextlib.suppress(ImportError):
        import triton.experimental.gluon


@triton.jit
def _reduce(x):
    """r and 2^n for x in [-87, 88]."""
    t = x * 1.44269504088896341 + 12582912.0  # 1.5 * 2^23: the low mantissa bits hold n
    n = t - 12582912.0
    r = n * -0.693359375 + x  # exact: few bits
    r = n * 2.12194440e-4 + r
    scale = ((t.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)  # without a conversion
    return r, scale


@triton.jit
def exp(x):
    """e^x for x in [-87, 88]; relative error of the polynomial 4e-9."""
    r, scale = _reduce(x)
    q = r * 1.381459878757596e-3 + 8.3687165752053261e-3
    q = q * r + 4.1668388992547989e-2
    q = q * r + 1.666652113199234e-1
    q = q * r + 4.9999994039535522e-1
    e = (q * r) * r + r
    return scale * e + scale


@triton.jit
def power_of_two(x):
    """2^x to 2 ulp, 0 where it would be subnormal: what a GPU's exponential unit gives."""
    if INTERPRETED:
        e = tl.exp2(x)
    else:
        e = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return e


@triton.jit
def power(x, low, FAST: tl.constexpr):
    """e^max(x, low), NaN where x is NaN, for low >= -87, x <= 88: to an ulp.

    FAST: e^x, whatever `low`, to 2 ulp and the |x| ulp of a product.
    """
    return power_of_two(x * LOG2_E) if FAST else exp(tl.where(x < low, low, x))


@triton.jit
def excess_near_zero(x):
    """(e^x - 1 - x) / x^2 for |x| <= NEAR; relative error 2.4e-7."""
    p = x * 1.990844904e-4 + 1.4071572805e-3
    p = p * x + 8.333791047e-3
    p = p * x + 4.166332632e-2
    p = p * x + 1.6666658223e-1
    return p * x + 5.000001192e-1


@triton.jit
def expm1(x):
    """(e^x - 1, e^x - 1 - x) for |x| <= 80, the second to full relative precision for small x."""
    r, scale = _reduce(x)
    q = r * 1.9857802544720471e-4 + 1.3933606678619981e-3
    q = q * r + 8.3333607763051987e-3
    q = q * r + 4.1666466742753983e-2
    q = q * r + 1.666666716337204e-1
    q = q * r + 0.5
    tail = q * r * r * scale  # 2^n (e^r - 1 - r)
    head = scale * r + (scale - 1.0)
    return tail + head, tail + (head - x)
