// guided = sum_p weights[p] * predictions[p]
// out = c0*sample + c1*guided + c2*previous + c3*noise; denoised = c4*sample + c5*guided
// All in fp32, rounded once.
#include "isa.h"
#include "parallel.h"
#include "simd.h"

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

constexpr int64_t kSerialElements = 1 << 15; // below this a second thread costs more than it saves

template <typename T> void step_range(const GuidedStep &a, int64_t begin, int64_t end) {
    const float *c = a.coefficients + (a.row ? *a.row * 6 : 0);
    const T *sample = static_cast<const T *>(a.sample) + begin;
    const T *predictions = static_cast<const T *>(a.predictions) + begin;
    const T *previous = a.previous ? static_cast<const T *>(a.previous) + begin : nullptr;
    const T *noise = a.noise ? static_cast<const T *>(a.noise) + begin : nullptr;
    T *out = static_cast<T *>(a.out) + begin;
    T *denoised = a.denoised ? static_cast<T *>(a.denoised) + begin : nullptr;
    for_vectors(end - begin, [&](int64_t i, auto vector) {
        Floats guided = {};
        for (int p = 0; p < a.num_predictions; ++p)
            guided += a.weights[p] * vector.load(predictions + p * a.numel + i);
        const Floats x = vector.load(sample + i);
        Floats next = c[0] * x + c[1] * guided;
        if (previous)
            next += c[2] * vector.load(previous + i);
        if (noise)
            next += c[3] * vector.load(noise + i);
        vector.store(out + i, next);
        if (denoised)
            vector.store(denoised + i, c[4] * x + c[5] * guided);
    });
}

} // namespace

void guided_step(const GuidedStep &a) {
    const int threads = a.numel < kSerialElements ? 1 : max_threads();
    for_dtype(a.dtype, [&](auto element) {
        parallel_for(a.numel, threads,
                     [&](int64_t begin, int64_t end, int) { step_range<decltype(element)>(a, begin, end); });
    });
}

} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
