// The few primitives that the kernels are written in. emulation/device.h defines them for a CPU
// too, so that tests can run the kernels' logic without a GPU.
#pragma once

#include "numerics.h"

namespace variator::cuda {

// 16 bytes: 8 elements of T.
struct alignas(16) Vec16 {
    uint32_t word[4];
};

}  // namespace variator::cuda

#if defined(VARIATOR_EMULATION)
#include "emulation/device.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define VARIATOR_DEVICE __device__ __forceinline__
#define VARIATOR_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define VARIATOR_UNROLL _Pragma("unroll")
// For a loop that would cost registers which the compiler does not have for Blackwell.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define VARIATOR_UNROLL_LESS _Pragma("unroll 4")
#else
#define VARIATOR_UNROLL_LESS VARIATOR_UNROLL
#endif

namespace variator::cuda {

VARIATOR_DEVICE int thread_index() {
    const int index = static_cast<int>(threadIdx.x);
    __builtin_assume(index >= 0);  // so that divisions are shifts
    return index;
}
VARIATOR_DEVICE int64_t block_x() { return blockIdx.x; }
VARIATOR_DEVICE int64_t block_y() { return blockIdx.y; }
VARIATOR_DEVICE int64_t block_z() { return blockIdx.z; }
VARIATOR_DEVICE int64_t grid_x() { return gridDim.x; }
VARIATOR_DEVICE void block_sync() { __syncthreads(); }
VARIATOR_DEVICE void grid_sync() { cooperative_groups::this_grid().sync(); }

VARIATOR_DEVICE char* shared_memory() {
    extern __shared__ __align__(16) char variator_shared[];
    return variator_shared;
}

VARIATOR_DEVICE float shuffle_xor(float value, int lanes) {
    return __shfl_xor_sync(0xffffffffu, value, lanes);
}

// Cached in L1, for data that is read again.
VARIATOR_DEVICE Vec16 load16(const void* p) {
    const uint4 v = *static_cast<const uint4*>(p);
    return {{v.x, v.y, v.z, v.w}};
}
// Not cached in L1, for data that a block reads once: the weights stay in L1.
VARIATOR_DEVICE Vec16 load16_once(const void* p) {
    Vec16 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(p));
    return v;
}
VARIATOR_DEVICE void store16(void* p, const Vec16& v) {
    *static_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}
// Copies 4, 8 or 16 bytes to shared memory in the background, or zeros if not `inside`. Copies are
// waited for by groups: all but the last `groups` that this thread committed.
template <int bytes>
VARIATOR_DEVICE void copy_async(void* shared, const void* global, bool inside) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int read = inside ? bytes : 0;
    if constexpr (bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
                     "r"(read)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global),
                     "n"(bytes), "r"(read)
                     : "memory");
}
VARIATOR_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups>
VARIATOR_DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}
VARIATOR_DEVICE void load4(const float* p, float* v) {
    const float4 f = *reinterpret_cast<const float4*>(p);
    v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
}
VARIATOR_DEVICE void store2(float* p, const float* v) {
    *reinterpret_cast<float2*>(p) = make_float2(v[0], v[1]);
}
VARIATOR_DEVICE void store4(float* p, const float* v) {
    *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
}

// A number for mma_tf32, which reads its upper 19 bits. `exact`: it has no more than those.
template <bool exact>
VARIATOR_DEVICE uint32_t to_tf32(float x) {
    if constexpr (exact) return __float_as_uint(x);
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}
// c += a · b: a [16, 8], b [8, 8], in the layout of PTX's mma.m16n8k8.
VARIATOR_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

struct BF16 {
    using Element = __nv_bfloat16;
    static constexpr bool fp32_range = true;
    static VARIATOR_DEVICE void unpack(uint32_t word, float& low, float& high) {
        low = __uint_as_float(word << 16);
        high = __uint_as_float(word & 0xffff0000u);
    }
    static VARIATOR_DEVICE uint32_t pack(float low, float high) {
        const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&v);
    }
    // The products of two pairs, rounded once.
    static VARIATOR_DEVICE uint32_t product(uint32_t a, uint32_t b) {
        const __nv_bfloat162 v = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                         *reinterpret_cast<const __nv_bfloat162*>(&b));
        return *reinterpret_cast<const uint32_t*>(&v);
    }
    static VARIATOR_DEVICE Element narrow(float x) { return __float2bfloat16_rn(x); }
    static VARIATOR_DEVICE float widen(Element x) { return __bfloat162float(x); }
    // c += a · b: a [16, 16], b [16, 8], in the layout of PTX's mma.m16n8k16.
    static VARIATOR_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};

struct F16 {
    using Element = __half;
    static constexpr bool fp32_range = false;
    static VARIATOR_DEVICE void unpack(uint32_t word, float& low, float& high) {
        const float2 v = __half22float2(*reinterpret_cast<const __half2*>(&word));
        low = v.x, high = v.y;
    }
    static VARIATOR_DEVICE uint32_t pack(float low, float high) {
        const __half2 v = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&v);
    }
    static VARIATOR_DEVICE uint32_t product(uint32_t a, uint32_t b) {
        const __half2 v =
            __hmul2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
        return *reinterpret_cast<const uint32_t*>(&v);
    }
    static VARIATOR_DEVICE Element narrow(float x) { return __float2half_rn(x); }
    static VARIATOR_DEVICE float widen(Element x) { return __half2float(x); }
    static VARIATOR_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};

}  // namespace variator::cuda
#endif
