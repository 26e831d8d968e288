// Threads for the CPU kernels: the pool of the OpenMP run-time that PyTorch has loaded.
#pragma once

#include <cstdint>

namespace kolors_fast {

// Threads that parallel_ranges would use now (torch.set_num_threads and OMP_NUM_THREADS count).
int max_threads();

using RangeBody = void (*)(const void *context, int64_t begin, int64_t end, int thread);

// Splits [0, count) into one contiguous range per thread. The split of a given count and thread number is always the
// same, so a thread finds again what it left in its cache. Serial inside a parallel region.
void parallel_ranges(int64_t count, int threads, RangeBody body, const void *context);

// The same for a callable body(begin, end, thread).
template <typename Body> void parallel_for(int64_t count, int threads, const Body &body) {
    parallel_ranges(
        count, threads,
        [](const void *context, int64_t begin, int64_t end, int thread) {
            (*static_cast<const Body *>(context))(begin, end, thread);
        },
        &body);
}

} // namespace kolors_fast
