// Gated activations over the two halves of each row of h [rows, 2 features]: y = value * act(gate).
//
// Rows are cut into pieces by the shape alone, so that few long rows keep all threads busy.
#pragma once

#include "../common/arguments.h"
#include "parallel.h"
#include "simd.h"

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

constexpr int64_t kPieceElements = 1 << 11;
constexpr int64_t kSerialElements = 1 << 14; // below this a second thread costs more than it saves

// act(gate) and its derivative.
struct Activated {
    Floats value, slope;
};

// Calls body(row, first element, count) for every piece of every row.
template <typename Body> void for_pieces(int64_t rows, int64_t features, const Body &body) {
    const int64_t pieces = (features + kPieceElements - 1) / kPieceElements;
    const int threads = rows * features < kSerialElements ? 1 : max_threads();
    parallel_for(rows * pieces, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = i % pieces * kPieceElements, left = features - first;
            body(i / pieces, first, left < kPieceElements ? left : kPieceElements);
        }
    });
}

// Activation has kGateFirst, apply(gate, element type) and differentiate(gate, element type).
template <typename Activation> void gate_forward(const GateForward &a) {
    const int64_t gate_at = Activation::kGateFirst ? 0 : a.features, value_at = a.features - gate_at;
    for_dtype(a.dtype, [&](auto element) {
        using T = decltype(element);
        for_pieces(a.rows, a.features, [&](int64_t row, int64_t first, int64_t count) {
            const T *h = static_cast<const T *>(a.h) + row * a.row_stride + first;
            const T *value = h + value_at, *gate = h + gate_at;
            T *y = static_cast<T *>(a.y) + row * a.features + first;
            for_vectors(count, [&](int64_t i, auto vector) {
                vector.store(y + i, vector.load(value + i) * Activation::apply(vector.load(gate + i), T{}));
            });
        });
    });
}

template <typename Activation> void gate_backward(const GateBackward &a) {
    const int64_t gate_at = Activation::kGateFirst ? 0 : a.features, value_at = a.features - gate_at;
    for_dtype(a.dtype, [&](auto element) {
        using T = decltype(element);
        for_pieces(a.rows, a.features, [&](int64_t row, int64_t first, int64_t count) {
            const T *h = static_cast<const T *>(a.h) + row * a.row_stride + first;
            const T *value = h + value_at, *gate = h + gate_at;
            const T *grad_y = static_cast<const T *>(a.grad_y) + row * a.features + first;
            T *grad_h = static_cast<T *>(a.grad_h) + row * 2 * a.features + first;
            T *grad_value = grad_h + value_at, *grad_gate = grad_h + gate_at;
            for_vectors(count, [&](int64_t i, auto vector) {
                const Floats g = vector.load(grad_y + i);
                const Activated act = Activation::differentiate(vector.load(gate + i), T{});
                vector.store(grad_value + i, g * act.value);
                vector.store(grad_gate + i, g * vector.load(value + i) * act.slope);
            });
        });
    });
}

} // namespace
} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
