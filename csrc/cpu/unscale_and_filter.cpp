// out = add + (x / scale, and 0 where that is not finite): fp32, rounded once.
#define KOLORS_FAST_KEEP_SUBNORMALS // gradients may be that small

#include "isa.h"
#include "parallel.h"
#include "simd.h"

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

constexpr int64_t kSerialElements = 1 << 15; // below this a second thread costs more than it saves

template <typename From, typename To> void unscale_range(const UnscaleAndFilter &a, int64_t begin, int64_t end) {
    const float scale = *a.scale;
    const From *x = static_cast<const From *>(a.x) + begin;
    const bool add_fp32 = a.add && a.add_dtype == DType::float32;
    const float *wide = add_fp32 ? static_cast<const float *>(a.add) + begin : nullptr;
    const From *narrow = a.add && !add_fp32 ? static_cast<const From *>(a.add) + begin : nullptr;
    To *out = static_cast<To *>(a.out) + begin;
    for_vectors(end - begin, [&](int64_t i, auto vector) {
        Floats z = finite_or_zero(vector.load(x + i) / scale);
        if (wide)
            z += vector.load(wide + i);
        else if (narrow)
            z += vector.load(narrow + i);
        vector.store(out + i, z);
    });
}

} // namespace

void unscale_and_filter(const UnscaleAndFilter &a) {
    const int threads = a.numel < kSerialElements ? 1 : max_threads();
    for_dtype(a.dtype, [&](auto from) {
        for_dtype(a.out_dtype, [&](auto to) {
            parallel_for(a.numel, threads, [&](int64_t begin, int64_t end, int) {
                unscale_range<decltype(from), decltype(to)>(a, begin, end);
            });
        });
    });
}

} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
