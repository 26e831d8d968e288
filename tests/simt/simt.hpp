// A small SIMT machine for tests: executes the CUDA kernels of csrc/cuda on the CPU when g++ compiles them.
//
// One fibre per thread of a block, switched at barriers and shuffles only; blocks run one after another. Shared
// memory is filled with NaN before every block. Threads and blocks can run in reverse, which exposes a missing
// barrier. Divergent barriers or shuffles, and misaligned vector accesses, end the launch with an error.
// What it cannot run: atomics, clusters, asynchronous copies, tensor cores.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- 16-bit floats, rounded to nearest even ----

struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};
struct alignas(4) __half2 {
    __half x, y;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

namespace simt {
template <typename To, typename From> To bit_cast(const From &from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}
} // namespace simt

inline float __bfloat162float(__nv_bfloat16 v) { return simt::bit_cast<float>(uint32_t{v.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
    const uint32_t bits = simt::bit_cast<uint32_t>(f);
    if (std::isnan(f))
        return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half v) {
    const int exponent = v.bits >> 10 & 31;
    const int fraction = v.bits & 1023;
    float f = exponent == 0 ? std::ldexp(float(fraction), -24) : std::ldexp(float(fraction + 1024), exponent - 25);
    if (exponent == 31)
        f = fraction ? NAN : INFINITY;
    return v.bits >> 15 ? -f : f;
}
inline __half __float2half_rn(float f) {
    const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
    if (std::isnan(f))
        return {0x7fff};
    const float a = std::fabs(f);
    if (a >= 65520.0f)
        return {static_cast<uint16_t>(sign | 0x7c00)};
    // the spacing of halves around a; nearbyint rounds to even, and a carry moves into the exponent
    const int exponent = std::max(a > 0.0f ? std::ilogb(a) : -14, -14);
    const int steps = static_cast<int>(std::nearbyint(std::ldexp(a, 10 - exponent)));
    return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + steps))};
}
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float __expf(float x) { return std::exp(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __fdividef(float x, float y) { return x / y; }

// ---- run-time API ----

using cudaStream_t = void *;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorMisalignedAddress = 716,
    cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

namespace simt {

enum class State { ready, barrier, shuffle, done };

// Saved places to go on at. The compiler's own pair: the C library's costs AddressSanitizer a sweep of the stack a
// switch.
using Resume = void *[5];

struct Fibre {
    ucontext_t start;
    Resume resume;
    std::unique_ptr<char[]> stack;
    State state;
    unsigned shuffles;
};

inline constexpr size_t kStack = 64 * 1024;
inline constexpr unsigned kWarpSize = 32;

inline int multiprocessors = 2;
inline bool reversed = false;
inline cudaError_t error = cudaSuccess;
inline unsigned thread, threads;
inline std::vector<Fibre> fibres;
inline std::vector<float4> shared_memory;
inline std::vector<float> exchanged; // [2][threads]: what each lane offers in even and odd shuffles
inline const std::function<void()> *body;
inline ucontext_t main_start;
inline Resume main_resume;

} // namespace simt

// one-dimensional grids and blocks are all that the kernels use
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) {
    *value = simt::multiprocessors;
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
    const cudaError_t last = simt::error;
    simt::error = cudaSuccess;
    return last;
}
inline cudaError_t cudaMemsetAsync(void *address, int value, size_t bytes, cudaStream_t) {
    std::memset(address, value, bytes);
    return cudaSuccess;
}

// ---- the machine ----

namespace simt {

__attribute__((noinline, no_sanitize("address"))) inline void go_to(Resume &place) { __builtin_longjmp(place, 1); }

__attribute__((noinline, no_sanitize("address"))) inline void yield(State state) {
    fibres[thread].state = state;
    if (!__builtin_setjmp(fibres[thread].resume))
        go_to(main_resume);
}

inline void fail(cudaError_t code) {
    error = code;
    yield(State::done);
}

inline void fibre_main() {
    (*body)();
    yield(State::done);
}

__attribute__((noinline, no_sanitize("address"))) inline void run(unsigned t) {
    Fibre &fibre = fibres[t];
    thread = t;
    threadIdx.x = t;
    const bool fresh = fibre.stack == nullptr || fibre.shuffles == ~0u;
    fibre.state = State::ready;
    if (__builtin_setjmp(main_resume))
        return;
    if (!fresh)
        go_to(fibre.resume);
    if (!fibre.stack)
        fibre.stack.reset(new char[kStack]);
    fibre.shuffles = 0;
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = fibre.stack.get();
    fibre.start.uc_stack.ss_size = kStack;
    fibre.start.uc_link = nullptr;
    makecontext(&fibre.start, fibre_main, 0);
    setcontext(&fibre.start);
}

// Frees the warps whose lanes all wait at a shuffle, or the block when all that are left wait at the barrier.
inline bool release() {
    bool released = false;
    bool all_at_barrier = true;
    for (unsigned first = 0; first < threads; first += kWarpSize) {
        const unsigned last = std::min(first + kWarpSize, threads);
        unsigned waiting = 0;
        for (unsigned t = first; t < last; ++t) {
            waiting += fibres[t].state == State::shuffle;
            all_at_barrier &= fibres[t].state == State::barrier || fibres[t].state == State::done;
        }
        if (waiting != last - first)
            continue;
        for (unsigned t = first; t < last; ++t)
            fibres[t].state = State::ready;
        released = true;
    }
    if (released || !all_at_barrier)
        return released;
    for (unsigned t = 0; t < threads; ++t) {
        if (fibres[t].state == State::barrier)
            fibres[t].state = State::ready, released = true;
    }
    return released;
}

inline void run_block() {
    std::fill(shared_memory.begin(), shared_memory.end(), float4{NAN, NAN, NAN, NAN});
    for (Fibre &fibre : fibres)
        fibre.state = State::ready, fibre.shuffles = ~0u;
    do {
        for (unsigned i = 0; i < threads; ++i) {
            const unsigned t = reversed ? threads - 1 - i : i;
            if (fibres[t].state == State::ready)
                run(t);
            if (error != cudaSuccess)
                return;
        }
    } while (release());
    for (unsigned t = 0; t < threads; ++t) {
        if (fibres[t].state != State::done)
            error = cudaErrorLaunchFailure;
    }
}

inline void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> &kernel) {
    if (error != cudaSuccess)
        return;
    if (grid.x == 0 || block.x == 0 || block.x > 1024 || block.x % kWarpSize != 0 || shared_bytes > 48 * 1024) {
        error = cudaErrorInvalidConfiguration;
        return;
    }
    threads = block.x;
    blockDim = block;
    gridDim = grid;
    body = &kernel;
    if (fibres.size() < threads)
        fibres.resize(threads);
    exchanged.resize(2 * fibres.size());
    shared_memory.resize((shared_bytes + sizeof(float4) - 1) / sizeof(float4));
    for (unsigned i = 0; i < grid.x && error == cudaSuccess; ++i) {
        blockIdx.x = reversed ? grid.x - 1 - i : i;
        run_block();
    }
}

inline void check_aligned(const void *address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
        fail(cudaErrorMisalignedAddress);
}

} // namespace simt

#define KF_LAUNCH(kernel, grid, block, smem, stream, ...)                                                              \
    ((void)(stream), simt::launch((grid), (block), (smem), [&] { kernel(__VA_ARGS__); }))
#define KF_SHARED(type, name) type *const name = reinterpret_cast<type *>(simt::shared_memory.data())
#define KF_CHECK_ALIGNED(address, bytes) simt::check_aligned(address, bytes)

inline void __syncthreads() { simt::yield(simt::State::barrier); }

inline float __shfl_sync(unsigned, float value, int source) {
    const unsigned thread = simt::thread;
    float *const offered = simt::exchanged.data() + simt::fibres[thread].shuffles++ % 2 * simt::fibres.size();
    offered[thread] = value;
    simt::yield(simt::State::shuffle);
    return offered[thread / simt::kWarpSize * simt::kWarpSize + source];
}
inline float __shfl_xor_sync(unsigned mask, float value, int bits) {
    return __shfl_sync(mask, value, static_cast<int>(simt::thread % simt::kWarpSize) ^ bits);
}
