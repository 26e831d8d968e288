// out = softmax(scale q k^T + bias) v in fp32, head by head.
//
// Keys and values are packed in blocks, as the right factors of the two products, and each tile of queries passes a
// block with its logits in the first-level cache. Over several blocks the softmax is computed as in Dao et al.,
// FlashAttention, arXiv 2205.14135: with the largest logit so far, and what was summed before scaled when it grows.
#include "isa.h"
#include "parallel.h"
#include "product.h"
#include "softmax.h"

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

constexpr int64_t kBlockBytes = 1 << 18; // of keys at a time; of values as much again
constexpr int64_t kMostKeys = 512;       // whose logits for a tile, and their transpose, take 52 KB
constexpr int64_t kQueries = 1 << 8;     // of a unit of work

struct Block {
    int64_t first, keys, panels; // panels of keys
    float *packed_keys, *packed_values, *bias;
};

// What a thread works in.
struct Memory {
    float *keys, *values, *bias, *queries, *logits, *weights, *largest, *sums;

    Memory(const Attention &a, int64_t keys_at_once, int64_t queries_at_once) {
        const int64_t columns = panels(keys_at_once) * kPanel, of_values = panels(a.head_dim) * kPanel;
        const int64_t sizes[] = {columns * a.head_dim,         keys_at_once * of_values, columns,
                                 queries_at_once * a.head_dim, columns * kTileRows,      columns * kTileRows,
                                 padded(queries_at_once),      padded(queries_at_once)};
        float **const parts[] = {&keys, &values, &bias, &queries, &logits, &weights, &largest, &sums};
        int64_t total = 0;
        for (const int64_t size : sizes)
            total += padded(size);
        float *at = scratch(total);
        for (int i = 0; i < 8; ++i) {
            *parts[i] = at;
            at += padded(sizes[i]);
        }
    }
};

void pack_block(const Attention &a, int64_t sample, int64_t head, const Block &block) {
    const AttentionRows<const float> &k = a.k, &v = a.v;
    for (int64_t panel = 0; panel < block.panels; ++panel) {
        const int64_t key = block.first + panel * kPanel, count = at_most(kPanel, block.first + block.keys - key);
        const float *from = k.data + sample * k.batch + key * k.token + head * k.head;
        float *to = block.packed_keys + panel * kPanel * a.head_dim;
        if (count == kPanel) {
            pack_tile(from, k.token, kPanel, a.head_dim, to);
            continue;
        }
        for (int64_t d = 0; d < a.head_dim; ++d)
            for (int64_t i = 0; i < kPanel; ++i)
                to[d * kPanel + i] = i < count ? from[i * k.token + d] : 0.0f;
    }
    for (int64_t i = 0; i < block.panels * kPanel; ++i)
        block.bias[i] = i >= block.keys ? -std::numeric_limits<float>::infinity()
                        : a.bias        ? a.bias[sample * a.keys + block.first + i]
                                        : 0.0f;
    for (int64_t i = 0; i < block.keys; ++i) {
        const float *from = v.data + sample * v.batch + (block.first + i) * v.token + head * v.head;
        for (int64_t panel = 0; panel < panels(a.head_dim); ++panel)
            for (int lane = 0; lane < kPanel; lane += kWidth) {
                const int64_t d = panel * kPanel + lane;
                store(block.packed_values + (panel * block.keys + i) * kPanel + lane,
                      load_columns(from, d, a.head_dim));
            }
    }
}

// The logits of a tile in rows of `block.panels * kPanel`.
template <int kRows> void multiply_keys(const Attention &a, const float *queries, const Block &block, float *logits) {
    const int64_t columns = block.panels * kPanel;
    for (int64_t panel = 0; panel < block.panels; ++panel)
        for (int at = 0; at < kHalfPanel; at += kWidth) {
            const int64_t left = panel * kPanel + at, right = left + kHalfPanel;
            const float *keys = block.packed_keys + panel * kPanel * a.head_dim + at;
            Floats sums[2 * kRows];
            multiply(queries, keys, keys, a.head_dim, Floats{}, Floats{}, sums,
                     std::make_integer_sequence<int, kRows>{});
            const Floats left_bias = load(block.bias + left), right_bias = load(block.bias + right);
            for (int r = 0; r < kRows; ++r) {
                store(logits + r * columns + left, sums[2 * r] * a.scale + left_bias);
                store(logits + r * columns + right, sums[2 * r + 1] * a.scale + right_bias);
            }
        }
}

// exp(logit - largest so far) in place of each logit; returns by how much what was summed before has to shrink.
KOLORS_FAST_INLINE float exponentials(float *logits, int64_t columns, float &largest, float &sum) {
    Floats most = broadcast(largest);
    for (int64_t i = 0; i < columns; i += kWidth)
        most = larger(load(logits + i), most);
    const float before = largest;
    largest = max_lanes(most);
    Floats total = {};
    for (int64_t i = 0; i < columns; i += kWidth) {
        const Floats weight = exp_minus(largest - load(logits + i));
        total += weight;
        store(logits + i, weight);
    }
    const float factor = before == largest ? 1.0f : exp_minus(broadcast(largest - before))[0];
    sum = sum * factor + static_cast<float>(sum_lanes(total));
    return factor;
}

// One tile of queries, whose first is `query`, by one block.
template <int kRows> void attend(const Attention &a, int64_t sample, int64_t head, int64_t query, const float *queries,
                                 const Block &block, const Memory &memory, float *largest, float *sums) {
    const int64_t columns = block.panels * kPanel;
    multiply_keys<kRows>(a, queries, block, memory.logits);
    float factors[kRows];
    for (int r = 0; r < kRows; ++r)
        factors[r] = exponentials(memory.logits + r * columns, columns, largest[r], sums[r]);
    pack_tile(memory.logits, columns, kRows, block.keys, memory.weights);
    const bool first = block.first == 0, last = block.first + block.keys == a.keys;
    for (int64_t panel = 0; panel < panels(a.head_dim); ++panel)
        for (int at = 0; at < kHalfPanel; at += kWidth) {
            const float *values = block.packed_values + panel * kPanel * block.keys + at;
            Floats found[2 * kRows];
            multiply(memory.weights, values, values, block.keys, Floats{}, Floats{}, found,
                     std::make_integer_sequence<int, kRows>{});
            for (int r = 0; r < kRows; ++r) {
                float *out = a.out + ((sample * a.queries + query + r) * a.heads + head) * a.head_dim;
                for (int half = 0; half < 2; ++half) {
                    const int64_t d = panel * kPanel + at + half * kHalfPanel;
                    Floats value = found[2 * r + half];
                    if (!first)
                        value += load_columns(out, d, a.head_dim) * factors[r];
                    store_columns(out, last ? value / sums[r] : value, d, a.head_dim);
                }
            }
        }
}

// Queries [first, first + count) of one head.
void attend(const Attention &a, int64_t sample, int64_t head, int64_t first, int64_t count, int64_t keys_at_once,
            const Memory &memory) {
    const AttentionRows<const float> &q = a.q;
    const Tiles cut(count);
    for (int64_t t = 0; t < cut.count; ++t)
        pack_tile(q.data + sample * q.batch + (first + cut.first(t)) * q.token + head * q.head, q.token,
                  cut.first(t + 1) - cut.first(t), a.head_dim, memory.queries + cut.first(t) * a.head_dim);
    for (int64_t i = 0; i < count; ++i) {
        memory.largest[i] = kLowest;
        memory.sums[i] = 0.0f;
    }
    for (int64_t key = 0; key < a.keys; key += keys_at_once) {
        const int64_t keys = at_most(keys_at_once, a.keys - key);
        const Block block{key, keys, panels(keys), memory.keys, memory.values, memory.bias};
        pack_block(a, sample, head, block);
        for (int64_t t = 0; t < cut.count; ++t)
            for_tile_rows(cut.first(t + 1) - cut.first(t), [&](auto rows) {
                const int64_t row = cut.first(t);
                attend<rows.value>(a, sample, head, first + row, memory.queries + row * a.head_dim, block, memory,
                                   memory.largest + row, memory.sums + row);
            });
    }
}

} // namespace

void attention(const Attention &a) {
    const int64_t fits = kBlockBytes / static_cast<int64_t>(sizeof(float)) / a.head_dim / kPanel * kPanel;
    const int64_t keys_at_once = at_most(a.keys, at_most(kMostKeys, std::max<int64_t>(kPanel, fits)));
    const int64_t heads = a.batch * a.heads;
    const int threads = max_threads();
    // heads among the threads as far as they go, then their queries, which pack the keys once more
    const int64_t apart = heads % threads == 0 ? 1 : at_most(threads, ceil_div(a.queries, kTileRows));
    const int64_t parts = std::max(apart, ceil_div(a.queries, kQueries));
    parallel_for(heads * parts, threads, [&](int64_t begin, int64_t end, int) {
        const Memory memory(a, keys_at_once, ceil_div(a.queries, parts));
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t head = unit / parts, part = unit % parts;
            const int64_t first = part * a.queries / parts, last = (part + 1) * a.queries / parts;
            attend(a, head / a.heads, head % a.heads, first, last - first, keys_at_once, memory);
        }
    });
}

} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
