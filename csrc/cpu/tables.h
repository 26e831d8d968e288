// Tables of whole vectors, and the small arithmetic around them. Internal linkage throughout, as in simd.h.
#pragma once

#include "simd.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

KOLORS_FAST_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
KOLORS_FAST_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
KOLORS_FAST_INLINE int64_t padded(int64_t count) { return ceil_div(count, kWidth) * kWidth; }

// Uninitialised memory: every table slot that counts is written before it is read. Aligned, for the tables' vectors.
struct Free {
    void operator()(void *memory) const { std::free(memory); }
};
template <typename Element> using Workspace = std::unique_ptr<Element[], Free>;

template <typename Element> Workspace<Element> workspace(int64_t count) {
    void *memory = std::aligned_alloc(64, (count * sizeof(Element) / 64 + 1) * 64);
    if (!memory)
        throw std::bad_alloc();
    return Workspace<Element>(static_cast<Element *>(memory));
}

} // namespace
} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
