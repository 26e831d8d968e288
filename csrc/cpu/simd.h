// Vectors of fp32 in the width of the instruction set this file is compiled for, written once with the vector
// extension of GCC and Clang. Everything has internal linkage: two instruction sets must never share a symbol.
#pragma once

#include "../common/dtype.h"

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define KOLORS_FAST_INLINE inline __attribute__((always_inline))

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(kWidth * 4)));
typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Uints __attribute__((vector_size(kWidth * 4)));
typedef uint16_t Halves __attribute__((vector_size(kWidth * 2)));

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

template <typename To, typename From> KOLORS_FAST_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

KOLORS_FAST_INLINE Floats broadcast(float value) { return value - Floats{}; }

KOLORS_FAST_INLINE Floats widen(Halves bits, Half) {
#if defined(__AVX512F__)
    return bit_cast<Floats>(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
#elif defined(__F16C__)
    return bit_cast<Floats>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
#else
    const Uints wide = __builtin_convertvector(bits, Uints);
    const Uints sign = (wide & 0x8000u) << 16, magnitude = (wide & 0x7fffu) << 13;
    // fp16 bits read as fp32 are 2^112 too small; Inf and NaN need the rest of the exponent
    const Uints scaled = bit_cast<Uints>(bit_cast<Floats>(magnitude) * 0x1p112f);
    return bit_cast<Floats>(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled));
#endif
}

KOLORS_FAST_INLINE Floats widen(Halves bits, BFloat16) {
    return bit_cast<Floats>(__builtin_convertvector(bits, Uints) << 16);
}

KOLORS_FAST_INLINE Halves narrow(Floats value, Half) {
#if defined(__AVX512F__)
    return bit_cast<Halves>(_mm512_cvtps_ph(bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    return bit_cast<Halves>(_mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
    const Uints bits = bit_cast<Uints>(value), magnitude = bits & 0x7fffffffu;
    // subnormal fp16: adding 0.5 leaves the rounded mantissa in the low bits
    const Uints tiny = bit_cast<Uints>(bit_cast<Floats>(magnitude) + 0.5f) - 0x3f000000u;
    const Uints normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const Uints infinite = Uints{} + 0x7c00u, nan = Uints{} + 0x7e00u;
    Uints half = magnitude < 0x38800000u ? tiny : normal;
    half = magnitude >= 0x477ff000u ? infinite : half;
    half = magnitude > 0x7f800000u ? nan : half;
    return __builtin_convertvector(half | (bits & 0x80000000u) >> 16, Halves);
#endif
}

KOLORS_FAST_INLINE Halves narrow(Floats value, BFloat16) {
    const Uints bits = bit_cast<Uints>(value), nan = Uints{} + 0x7fc0u;
    const Uints rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, Halves);
}

// Loads and stores need no alignment beyond one byte.
KOLORS_FAST_INLINE Floats load(const float *from) {
    Floats value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

template <typename T> KOLORS_FAST_INLINE Floats load(const T *from) {
    Halves bits;
    std::memcpy(&bits, from, sizeof(bits));
    return widen(bits, T{});
}

KOLORS_FAST_INLINE void store(float *to, Floats value) { std::memcpy(to, &value, sizeof(value)); }

template <typename T> KOLORS_FAST_INLINE void store(T *to, Floats value) {
    const Halves bits = narrow(value, T{});
    std::memcpy(to, &bits, sizeof(bits));
}

// The first count < kWidth elements; the other lanes read as zero.
template <typename T> KOLORS_FAST_INLINE Floats load_some(const T *from, int64_t count) {
    T buffer[kWidth] = {};
    for (int64_t i = 0; i < count; ++i)
        buffer[i] = from[i];
    return load(buffer);
}

template <typename T> KOLORS_FAST_INLINE void store_some(T *to, Floats value, int64_t count) {
    T buffer[kWidth];
    store(buffer, value);
    for (int64_t i = 0; i < count; ++i)
        to[i] = buffer[i];
}

// How to touch one vector of a row: all of it, or its last few elements.
struct Whole {
    template <typename T> KOLORS_FAST_INLINE Floats load(const T *from) const { return KOLORS_FAST_ISA::load(from); }
    template <typename T> KOLORS_FAST_INLINE void store(T *to, Floats value) const {
        KOLORS_FAST_ISA::store(to, value);
    }
};

struct Rest {
    int64_t count;
    template <typename T> KOLORS_FAST_INLINE Floats load(const T *from) const { return load_some(from, count); }
    template <typename T> KOLORS_FAST_INLINE void store(T *to, Floats value) const { store_some(to, value, count); }
};

// Calls body(first element, Whole or Rest) for each vector of a row.
template <typename Body> KOLORS_FAST_INLINE void for_vectors(int64_t count, const Body &body) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth)
        body(i, Whole{});
    if (i < count)
        body(i, Rest{count - i});
}

KOLORS_FAST_INLINE double sum_lanes(Floats value) {
    double sum = 0;
    for (int lane = 0; lane < kWidth; ++lane)
        sum += value[lane];
    return sum;
}

// 1 / (1 + exp(-x)), within 2 ulp. exp overflows to Inf and underflows to 0 as it should; NaN stays NaN.
KOLORS_FAST_INLINE Floats sigmoid(Floats x) {
    const Floats low = broadcast(-87.0f), high = broadcast(89.0f);
    Floats t = -x;
    t = t < low ? low : t; // exp(-87) vanishes beside 1
    t = t > high ? high : t;
    const float shift = 0x1.8p23f; // adding and subtracting it rounds to an integer
    const Floats shifted = t * 1.44269504f + shift;
    const Floats n = shifted - shift;
    const Floats r = (t - n * 0.693359375f) + n * 2.12194440e-4f; // ln 2 in two parts
    Floats p = broadcast(1.9875691500e-4f);                       // Cephes expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    // 2^n as 2 * 2^(n-1), for n may be 128
    const Ints exponent = (bit_cast<Ints>(shifted) - (0x4b400000 - 126)) << 23;
    const Floats e = (p + p) * bit_cast<Floats>(exponent);
    return 1.0f / (1.0f + e);
}

KOLORS_FAST_INLINE float read_scalar(const void *from, int64_t index, DType dtype) {
    if (dtype == DType::float32)
        return static_cast<const float *>(from)[index];
    Halves bits = {};
    bits[0] = static_cast<const uint16_t *>(from)[index];
    return (dtype == DType::float16 ? widen(bits, Half{}) : widen(bits, BFloat16{}))[0];
}

// Calls body with a value of the element type.
template <typename Body> KOLORS_FAST_INLINE void for_dtype(DType dtype, Body body) {
    if (dtype == DType::float32)
        body(float{});
    else if (dtype == DType::float16)
        body(Half{});
    else
        body(BFloat16{});
}

} // namespace
} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
