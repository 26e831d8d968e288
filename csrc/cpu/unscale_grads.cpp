// grads[i] /= scales[i] in place, the L2 norm of all of them, and which hold a NaN or Inf.
//
// Tensors are cut into chunks of a fixed size, whose sums of squares are merged in order: the bits do not depend on
// the number of threads. Sums are fp64, in which no sum of squares of fp32 numbers overflows: a sum that is not finite
// has met a NaN or Inf.
#include "isa.h"
#include "parallel.h"
#include "simd.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

constexpr int64_t kChunk = 1 << 14; // elements

typedef float HalfFloats __attribute__((vector_size(kWidth * 2)));
typedef double Doubles __attribute__((vector_size(kWidth * 4))); // half as many lanes as Floats

struct Halved {
    HalfFloats low, high;
};

KOLORS_FAST_INLINE Doubles square(HalfFloats values) {
    const Doubles wide = __builtin_convertvector(values, Doubles);
    return wide * wide;
}

KOLORS_FAST_INLINE Floats rounded(Floats value, float) { return value; }
template <typename T> KOLORS_FAST_INLINE Floats rounded(Floats value, T type) {
    return widen(narrow(value, type), type);
}

// Sum of squares of the quotients as they were before rounding, or NaN where rounding gave Inf.
template <typename T> double unscale_chunk(T *data, int64_t count, float scale) {
    Doubles low = {}, high = {};
    for_vectors(count, [&](int64_t i, auto vector) {
        const Floats value = vector.load(data + i) / scale;
        vector.store(data + i, value);
        const Floats stored = rounded(value, T{});
        const Halved kept = bit_cast<Halved>(vector.only(value + (stored - stored)));
        low += square(kept.low);
        high += square(kept.high);
    });
    const Doubles sums = low + high;
    double sum = 0;
    for (int lane = 0; lane < kWidth / 2; ++lane)
        sum += sums[lane];
    return sum;
}

} // namespace

void unscale_grads(const UnscaleGrads &a) {
    std::vector<int64_t> first(a.tensors + 1); // chunk of each tensor
    for (int64_t t = 0; t < a.tensors; ++t)
        first[t + 1] = first[t] + (a.table[t].numel + kChunk - 1) / kChunk;
    std::vector<double> sums(first[a.tensors]);
    const int threads = sums.size() < 3 ? 1 : max_threads();
    parallel_for(first[a.tensors], threads, [&](int64_t begin, int64_t end, int) {
        int64_t t = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            while (chunk >= first[t + 1])
                ++t;
            const TensorEntry &tensor = a.table[t];
            const int64_t at = (chunk - first[t]) * kChunk;
            const float scale = a.scales[t * a.scale_stride];
            for_dtype(static_cast<DType>(tensor.dtype), [&](auto element) {
                auto *data = reinterpret_cast<decltype(element) *>(tensor.address) + at;
                sums[chunk] = unscale_chunk(data, std::min(kChunk, tensor.numel - at), scale);
            });
        }
    });
    double total = 0;
    for (int64_t t = 0; t < a.tensors; ++t) {
        double sum = 0;
        for (int64_t chunk = first[t]; chunk < first[t + 1]; ++chunk)
            sum += sums[chunk];
        a.nonfinite[t] = !std::isfinite(sum);
        total += sum;
    }
    *a.norm = static_cast<float>(std::sqrt(total));
}

} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
