// What a softmax over vectors of fp32 logits is made of. Internal linkage, as in simd.h.
#pragma once

#include "gauss.h"
#include "simd.h"

#include <limits>

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

// Where a largest logit begins. Finite: where all keys so far are masked, they weigh exp(-inf) and not exp(0).
constexpr float kLowest = -std::numeric_limits<float>::max();

// exp(-y) for y >= 0, within 2 ulp down to 2^-126; below, and for infinite y, zero. NaN stays NaN.
KOLORS_FAST_INLINE Floats exp_minus(Floats y) {
    const float shift = 0x1.8p23f; // adding and subtracting it rounds to an integer
    y = at_most(y, 88.02f);        // 2^-127 counts as zero
    const Floats shifted = y * 1.44269504f + shift, n = shifted - shift;
    return exp_minus_rest((y - n * 0.693359375f) + n * 2.12194440e-4f) * power_of_two(shifted);
}

// True in the lanes before `count`.
KOLORS_FAST_INLINE auto before(int64_t count) {
    Ints lanes;
    for (int lane = 0; lane < kWidth; ++lane)
        lanes[lane] = lane;
    return lanes < (static_cast<int32_t>(count < kWidth ? count : kWidth) + Ints{});
}

} // namespace
} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
