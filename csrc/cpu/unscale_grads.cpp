// grads[i] /= scales[i] in place, the L2 norm of all of them, and which hold a NaN or Inf.
//
// Tensors are cut into chunks of a fixed size, whose sums are merged in order: the bits do not depend on the number of
// threads. Squares are summed in fp32 over kBlock elements and in fp64 above that.
#define KOLORS_FAST_KEEP_SUBNORMALS // gradients may be that small

#include "isa.h"
#include "parallel.h"
#include "simd.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

constexpr int64_t kChunk = 1 << 14;          // elements of a thread's turn
constexpr int64_t kBlock = 32 * kWidth;      // elements that are summed in fp32
constexpr int64_t kSerialElements = 1 << 15; // below this a second thread costs more than it saves

// The bits of what is stored, without the sign; Inf and NaN have the largest.
KOLORS_FAST_INLINE Uints magnitude(Floats value, float) { return bit_cast<Uints>(value) & 0x7fffffffu; }
template <typename T> KOLORS_FAST_INLINE Halves magnitude(Floats value, T type) { return narrow(value, type) & 0x7fff; }
constexpr uint32_t infinity(float) { return 0x7f800000; }
constexpr uint32_t infinity(Half) { return 0x7c00; }
constexpr uint32_t infinity(BFloat16) { return 0x7f80; }

struct Chunk {
    double squares; // of the quotients before they are rounded
    bool finite;    // all that is stored
};

template <typename T> Chunk unscale_chunk(T *data, int64_t count, float scale) {
    double sum = 0;
    auto largest = magnitude(Floats{}, T{});
    for (; count > 0; count -= kBlock, data += kBlock) {
        Floats squares = {};
        for_vectors(std::min(count, kBlock), [&](int64_t i, auto vector) {
            const Floats quotient = vector.only(vector.load(data + i) / scale);
            vector.store(data + i, quotient);
            squares += quotient * quotient;
            const auto stored = magnitude(quotient, T{});
            largest = stored > largest ? stored : largest;
        });
        sum += sum_lanes(squares);
    }
    bool finite = true;
    for (int lane = 0; lane < kWidth; ++lane)
        finite = finite && largest[lane] < infinity(T{});
    return {sum, finite};
}

} // namespace

void unscale_grads(const UnscaleGrads &a) {
    std::vector<int64_t> first(a.tensors + 1); // chunk of each tensor
    int64_t elements = 0;
    for (int64_t t = 0; t < a.tensors; ++t) {
        first[t + 1] = first[t] + (a.table[t].numel + kChunk - 1) / kChunk;
        elements += a.table[t].numel;
    }
    std::vector<Chunk> chunks(first[a.tensors]);
    const int threads = elements < kSerialElements ? 1 : max_threads();
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
                chunks[chunk] = unscale_chunk(data, std::min(kChunk, tensor.numel - at), scale);
            });
        }
    });
    double total = 0;
    for (int64_t t = 0; t < a.tensors; ++t) {
        bool finite = true;
        for (int64_t chunk = first[t]; chunk < first[t + 1]; ++chunk) {
            total += chunks[chunk].finite ? chunks[chunk].squares : NAN;
            finite = finite && chunks[chunk].finite;
        }
        a.nonfinite[t] = !finite;
    }
    *a.norm = static_cast<float>(std::sqrt(total));
}

} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
