// How the LayerNorm row kernels are cut into thread blocks: pure functions of shape and SM count.
#pragma once

#include "common/arguments.h"
#include "common/division.h"

#include <algorithm>
#include <cstdint>

namespace kolors_fast {

constexpr int kNormForwardRows = 4; // of a forward block, one warp each
constexpr int kNormForwardThreads = 32 * kNormForwardRows;
constexpr int kNormThreadColumns = 8;     // of a backward thread
constexpr int kNormBackwardThreads = 384; // of the largest backward block; a wider row is read twice
constexpr int kNormBackwardResidency = 2; // of such blocks on one SM
// of a chunk, or its partial sums weigh as much as its rows
constexpr int64_t kNormLeastRows = 4;
constexpr int kNormLargeDevice = 160;                // multiprocessors
constexpr int64_t kNormWidestRow = int64_t{1} << 30; // columns are counted in 32 bits, offsets in 64

// Backward: a block sums over `rows` rows of one sample, in `threads` threads.
struct LayerNormPlan {
    int64_t rows, chunks; // the last chunk of a sample may have fewer rows
    int threads;

    int64_t blocks(const LayerNormShape &s) const { return s.batch * chunks; }
};

inline LayerNormPlan layer_norm_plan(const LayerNormShape &s, int multiprocessors) {
    const int64_t wanted = round_up(ceil_div(s.d, kNormThreadColumns), 32);
    const int64_t threads = std::min<int64_t>(wanted, kNormBackwardThreads);
    const int64_t resident = multiprocessors * (kNormBackwardThreads * kNormBackwardResidency / threads);
    const int64_t chunks = std::max<int64_t>(1, resident / s.batch);
    const int64_t rows = std::max(kNormLeastRows, ceil_div(s.rows, chunks));
    return {rows, ceil_div(s.rows, rows), static_cast<int>(threads)};
}

// fp32 [sums, batch, chunks, d]
inline int64_t layer_norm_workspace(const LayerNormShape &s, int sums, int multiprocessors) {
    if (s.batch <= 0 || s.rows <= 0 || s.d <= 0)
        return 0;
    return sums * layer_norm_plan(s, multiprocessors).blocks(s) * s.d * static_cast<int64_t>(sizeof(float));
}

} // namespace kolors_fast
