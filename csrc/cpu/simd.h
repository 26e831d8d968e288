// Vectors of fp32 in the width of the instruction set this file is compiled for, written once with the vector
// extension of GCC and Clang. Everything has internal linkage: two instruction sets must never share a symbol.
#pragma once

#include "../common/dtype.h"

#include <cstdint>
#include <cstring>
#include <type_traits>

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

// The compilers' own conversions between these widths take several times as many instructions.
KOLORS_FAST_INLINE Uints extend(Halves bits) {
#if defined(__AVX512F__)
    return bit_cast<Uints>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(bits)));
#elif defined(__AVX2__)
    return bit_cast<Uints>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
#else
    return __builtin_convertvector(bits, Uints);
#endif
}

KOLORS_FAST_INLINE Halves low_halves(Uints bits) {
#if defined(__AVX512F__)
    return bit_cast<Halves>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(bits)));
#elif defined(__AVX2__)
    const __m256i packed = _mm256_packus_epi32(bit_cast<__m256i>(bits), bit_cast<__m256i>(bits)); // all below 2^16
    return bit_cast<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
    return __builtin_convertvector(bits, Halves);
#endif
}

// The bound where value is beyond it; NaN stays.
KOLORS_FAST_INLINE Floats at_least(Floats value, float low) {
#if defined(__AVX512F__)
    return bit_cast<Floats>(_mm512_max_ps(_mm512_set1_ps(low), bit_cast<__m512>(value)));
#elif defined(__AVX2__)
    return bit_cast<Floats>(_mm256_max_ps(_mm256_set1_ps(low), bit_cast<__m256>(value)));
#else
    return value < low ? broadcast(low) : value;
#endif
}

KOLORS_FAST_INLINE Floats at_most(Floats value, float high) {
#if defined(__AVX512F__)
    return bit_cast<Floats>(_mm512_min_ps(_mm512_set1_ps(high), bit_cast<__m512>(value)));
#elif defined(__AVX2__)
    return bit_cast<Floats>(_mm256_min_ps(_mm256_set1_ps(high), bit_cast<__m256>(value)));
#else
    return value > high ? broadcast(high) : value;
#endif
}

KOLORS_FAST_INLINE Floats clamp(Floats value, float low, float high) { return at_most(at_least(value, low), high); }

KOLORS_FAST_INLINE Floats finite_or_zero(Floats value) {
    const Floats zero = value - value; // NaN where value is not finite
    return zero == zero ? value : Floats{};
}

KOLORS_FAST_INLINE Floats widen(Halves bits, Half) {
#if defined(__AVX512F__)
    return bit_cast<Floats>(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
#elif defined(__F16C__)
    return bit_cast<Floats>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
#else
    const Uints wide = extend(bits);
    const Uints sign = (wide & 0x8000u) << 16, magnitude = (wide & 0x7fffu) << 13;
    // fp16 bits read as fp32 are 2^112 too small; Inf and NaN need the rest of the exponent
    const Uints scaled = bit_cast<Uints>(bit_cast<Floats>(magnitude) * 0x1p112f);
    return bit_cast<Floats>(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled));
#endif
}

KOLORS_FAST_INLINE Floats widen(Halves bits, BFloat16) { return bit_cast<Floats>(extend(bits) << 16); }

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
    return low_halves(half | (bits & 0x80000000u) >> 16);
#endif
}

// A NaN here is the result of arithmetic, so quiet: cutting it off leaves a NaN, while rounding might carry it away.
// The instruction takes subnormals for zero; a source that must keep them defines KOLORS_FAST_KEEP_SUBNORMALS.
KOLORS_FAST_INLINE Halves narrow(Floats value, BFloat16) {
#if defined(__AVX512BF16__) && !defined(KOLORS_FAST_KEEP_SUBNORMALS)
    return bit_cast<Halves>(_mm512_cvtneps_pbh(bit_cast<__m512>(value)));
#else
    const Uints bits = bit_cast<Uints>(value);
    const Uints rounding = ((bits >> 16) & 1u) + 0x7fffu;
    return low_halves((bits + (value == value ? rounding : Uints{})) >> 16);
#endif
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
    // zeroes the lanes that are not there
    KOLORS_FAST_INLINE Floats only(Floats value) const { return value; }
};

struct Rest {
    int64_t count;
    template <typename T> KOLORS_FAST_INLINE Floats load(const T *from) const { return load_some(from, count); }
    template <typename T> KOLORS_FAST_INLINE void store(T *to, Floats value) const { store_some(to, value, count); }
    KOLORS_FAST_INLINE Floats only(Floats value) const {
        float buffer[kWidth] = {};
        store_some(buffer, value, count);
        return KOLORS_FAST_ISA::load(buffer);
    }
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
    double sums[4] = {}; // four chains of additions instead of one
    for (int lane = 0; lane < kWidth; ++lane)
        sums[lane % 4] += value[lane];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The larger of each two; NaN of the second stays.
KOLORS_FAST_INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return bit_cast<Floats>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
    return bit_cast<Floats>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
    return a > b ? a : b;
#endif
}

KOLORS_FAST_INLINE float max_lanes(Floats value) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(bit_cast<__m512>(value));
#else
    float most = value[0];
    for (int lane = 1; lane < kWidth; ++lane)
        most = value[lane] > most ? value[lane] : most;
    return most;
#endif
}

constexpr float kSigmoidRange = 87.0f; // beyond it exp(-x) or 1 / exp(-x) is no normal number, and of no importance

// 1 / (1 + exp(-x)) for |x| <= kSigmoidRange, within 4 ulp. NaN stays NaN.
KOLORS_FAST_INLINE Floats bounded_sigmoid(Floats x) {
    const float shift = 0x1.8p23f; // adding and subtracting it rounds to an integer
#if defined(__AVX512F__)
    // exp(-x) = 2^(n/16) exp(-r), |r| <= ln(2)/32; the bits of 2^(n/16) are powers[n % 16] + (n << 19)
    const Uints powers = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532,
                          0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
                          0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
    const Floats shifted = shift - x * 23.0831207f, n = shifted - shift;
    const __m512i index = bit_cast<__m512i>(shifted);
    const Floats power = bit_cast<Floats>(bit_cast<Uints>(_mm512_permutexvar_epi32(index, bit_cast<__m512i>(powers))) +
                                          (bit_cast<Uints>(shifted) << 19));
    const Floats r = (x + n * 0.0433197021484375f) + n * 1.9966366e-6f; // ln(2)/16 in two parts
    const Floats q = ((0.5f - r * 0.16666667f) * r - 1.0f) * r;         // exp(-r) - 1, error 1e-8
    const Floats d = (1.0f + power) + power * q;
    const Floats guess = bit_cast<Floats>(_mm512_rcp14_ps(bit_cast<__m512>(d)));
    return guess + guess * (1.0f - d * guess); // Newton's step
#else
    const Floats shifted = shift - x * 1.44269504f;
    const Floats n = shifted - shift;
    const Floats r = (x + n * 0.693359375f) - n * 2.12194440e-4f; // ln 2 in two parts; exp(-x) = 2^n exp(-r)
    Floats q = broadcast(1.3814467e-3f);                          // minimax over |r| < ln(2)/2, relative error 5e-9
    q = q * r - 8.368781e-3f;
    q = q * r + 4.1668393e-2f;
    q = q * r - 1.666652e-1f;
    q = q * r + 4.9999994e-1f;
    const Floats p = q * (r * r) + (1.0f - r);
    return 1.0f / (1.0f + p * bit_cast<Floats>((bit_cast<Ints>(shifted) - (0x4b400000 - 127)) << 23));
#endif
}

// 1 / (1 + exp(-x)), as exactly as a T will hold it: within 4 ulp, or 2^-12 for bf16.
template <typename T = float> KOLORS_FAST_INLINE Floats sigmoid(Floats x) {
#if defined(__AVX512F__)
    if (std::is_same<T, BFloat16>::value) {
        const __m512 t = bit_cast<__m512>(x * -1.44269504f); // exp(-x) = 2^floor(t) 2^f
        const Floats f = bit_cast<Floats>(_mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF));
        Floats p = f * 0.0780245224f + 0.226067156f; // minimax over [0, 1), relative error 8e-5
        p = p * f + 0.69583354f;
        p = p * f + 0.999925219f;
        const Floats d = 1.0f + bit_cast<Floats>(_mm512_scalef_ps(bit_cast<__m512>(p), t));
        return bit_cast<Floats>(_mm512_rcp14_ps(bit_cast<__m512>(d)));
    }
#endif
    return bounded_sigmoid(clamp(x, -kSigmoidRange, kSigmoidRange));
}

// x sigmoid(x)
template <typename T = float> KOLORS_FAST_INLINE Floats silu(Floats x) {
#if defined(__AVX512F__)
    if (std::is_same<T, BFloat16>::value)
        return x * sigmoid<T>(x);
#endif
    x = at_least(x, -kSigmoidRange); // further out its product with the last sigmoid would grow again
    return x * bounded_sigmoid(at_most(x, kSigmoidRange));
}

// d silu(x) / dx
template <typename T = float> KOLORS_FAST_INLINE Floats silu_gradient(Floats x) {
    x = at_least(x, -kSigmoidRange); // as in silu
    const Floats s = sigmoid<T>(x);
    return s + s * (x - x * s);
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
