// The normal distribution on vectors of fp32: its density and its distribution function Phi, from one exponential.
//
// For a = |x|, Phi(-a) = exp(-a^2 / 2) * ratio(a), where ratio is smooth and between 0.5 and 0.03: a quotient of two
// polynomials with positive coefficients, fitted to the smallest largest relative error. So the left tail keeps its
// digits, where 0.5 * (1 + erf(x / sqrt(2))) has none left at x = -6. Beyond 13.24, where Phi(-a) < 3e-40, the
// exponential is zero. NaN stays NaN. Internal linkage, as in simd.h.
#pragma once

#include "simd.h"

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

struct Gauss {
    Floats cdf, pdf;
};

// 2^-n, where the low bits of shifted = n + 1.5 * 2^23 hold the integer n, 0 <= n <= 127; 2^-127 counts as zero.
KOLORS_FAST_INLINE Floats power_of_two(Floats shifted) {
    return bit_cast<Floats>(((0x4b400000 + 127) - bit_cast<Ints>(shifted)) << 23);
}

KOLORS_FAST_INLINE Floats magnitude(Floats x) { return bit_cast<Floats>(bit_cast<Ints>(x) & 0x7fffffff); }

KOLORS_FAST_INLINE Gauss gauss_of_tail(Floats x, Floats exponential, Floats tail) {
    return {x < 0.0f ? tail : 1.0f - tail, exponential * 0.39894228f};
}

// exp(-r) for |r| < ln(2) / 2, relative error 3e-9.
KOLORS_FAST_INLINE Floats exp_minus_rest(Floats r) {
    Floats q = broadcast(1.38142e-3f); // exp(-r) = 1 - r + q r^2
    q = q * r - 8.3689e-3f;
    q = q * r + 4.166841e-2f;
    q = q * r - 1.6666519e-1f;
    q = q * r + 4.9999993e-1f;
    return q * (r * r) + (1.0f - r);
}

// For results in fp32: the tail within 4 ulp.
KOLORS_FAST_INLINE Gauss gauss(Floats x, float) {
    const float shift = 0x1.8p23f; // adding and subtracting it rounds to an integer
    const Floats a = magnitude(clamp(x, -13.27f, 13.27f));
    // a^2 = high^2 + rest, with high^2 exact: a rounding error of a^2 would grow in the exponential
    const Floats high = bit_cast<Floats>(bit_cast<Ints>(a) & ~0xfff);
    const Floats rest = (a - high) * (a + high);
    const Floats shifted = a * a * 0.72134752f + shift; // log2(e) / 2
    const Floats n = shifted - shift;
    const Floats half_square = 0.5f * high * high;
    const Floats r = ((half_square - n * 0.693359375f) + n * 2.12194440e-4f) + 0.5f * rest; // ln 2 in two parts
    const Floats exponential = exp_minus_rest(r) * power_of_two(shifted);
    // relative error of the quotient 5e-9; from 0.75 / 1.5 on, because just above 0.5 / 1 a rounding weighs most
    Floats over = broadcast(0.0060302674f);
    over = over * a + 0.059976143f;
    over = over * a + 0.27195981f;
    over = over * a + 0.65352906f;
    over = over * a + 0.75f;
    Floats under = broadcast(0.015115424f);
    under = under * a + 0.15034897f;
    under = under * a + 0.69656963f;
    under = under * a + 1.791725f;
    under = under * a + 2.5038855f;
    under = under * a + 1.5f;
    return gauss_of_tail(x, exponential, exponential * over / under);
}

// For results in 16 bit: relative error 3e-5, a tenth of the rounding of fp16. a^2 is exact there, or nearly.
template <typename T> KOLORS_FAST_INLINE Gauss gauss(Floats x, T) {
    const float shift = 0x1.8p23f;
    const Floats a = magnitude(clamp(x, -13.27f, 13.27f));
    const Floats exponent = a * a * 0.72134752f;
    const Floats shifted = exponent + shift;
    const Floats f = exponent - (shifted - shift);
    Floats p = broadcast(9.57001e-3f); // 2^-f for |f| < 1/2, relative error 3e-6
    p = p * f - 5.591868e-2f;
    p = p * f + 2.4024753e-1f;
    p = p * f - 6.9312171e-1f;
    p = p * f + 9.9999926e-1f;
    const Floats exponential = p * power_of_two(shifted);
    const Floats over =
        (6.2038982e-2f * a + 2.7711813e-1f) * a + 5.0001147e-1f; // relative error of the quotient 2.3e-5
    const Floats under = ((1.5532072e-1f * a + 6.9990624e-1f) * a + 1.3528373f) * a + 1.0f;
    return gauss_of_tail(x, exponential, exponential * over / under);
}

} // namespace
} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
