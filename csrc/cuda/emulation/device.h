// device.cuh for a CPU: the same names, for threads that fibers.cpp switches between.
#pragma once

#include <cstring>

#include "runtime.h"

#define VARIATOR_DEVICE inline
#define VARIATOR_KERNEL(threads, blocks) inline void
#define VARIATOR_UNROLL
#define VARIATOR_UNROLL_LESS

namespace variator::cuda {

int thread_index();
int64_t block_x();
int64_t block_y();
int64_t block_z();
int64_t grid_x();
void block_sync();
void grid_sync();
char* shared_memory();

// Each lane of a warp passes `bytes` bytes and gets those of all 32 lanes, in lane order.
const char* exchange(const void* mine, size_t bytes);

inline float shuffle_xor(float value, int lanes) {
    float all[32];
    std::memcpy(all, exchange(&value, sizeof value), sizeof all);
    return all[(thread_index() % 32) ^ lanes];
}

inline Vec16 load16(const void* p) {
    Vec16 v;
    std::memcpy(&v, __builtin_assume_aligned(p, 16), sizeof v);
    return v;
}
inline Vec16 load16_once(const void* p) { return load16(p); }
inline void store16(void* p, const Vec16& v) { std::memcpy(p, &v, sizeof v); }

// Copies happen when they are waited for, so that a missing wait shows.
void copy_later(void* to, const void* from, size_t bytes);
void copies_commit();
void wait_for_copies(size_t groups);
template <int bytes>
void copy_async(void* shared, const void* global, bool inside) {
    copy_later(__builtin_assume_aligned(shared, bytes),
               inside ? __builtin_assume_aligned(global, bytes) : nullptr, bytes);
}
template <int groups>
void copies_wait() {
    wait_for_copies(groups);
}

inline void load4(const float* p, float* v) { std::memcpy(v, p, 16); }
inline void store2(float* p, const float* v) { std::memcpy(p, v, 8); }
inline void store4(float* p, const float* v) { std::memcpy(p, v, 16); }

// 16-bit floats: `Element` holds the bits.
struct BF16 {
    using Element = uint16_t;
    static constexpr bool fp32_range = true;
    static float widen(Element x) {
        const uint32_t bits = static_cast<uint32_t>(x) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    static Element narrow(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        if (x != x) return static_cast<Element>(bits >> 16 | 0x40);
        return static_cast<Element>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    static void unpack(uint32_t word, float& low, float& high);
    static uint32_t pack(float low, float high);
    static uint32_t product(uint32_t a, uint32_t b);
    static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
};
struct F16 {
    using Element = uint16_t;
    static constexpr bool fp32_range = false;
    static float widen(Element x) {
        _Float16 value;
        std::memcpy(&value, &x, 2);
        return static_cast<float>(value);
    }
    static Element narrow(float x) {
        const _Float16 value = static_cast<_Float16>(x);
        Element bits;
        std::memcpy(&bits, &value, 2);
        return bits;
    }
    static void unpack(uint32_t word, float& low, float& high);
    static uint32_t pack(float low, float high);
    static uint32_t product(uint32_t a, uint32_t b);
    static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
};

// c += a · b in the register layout of PTX's mma.m16n8k16: with row = lane / 4 and pair = lane % 4,
// a lane holds a[row (+8)][2·pair (+8), +1], b[2·pair (+8), +1][row], c[row (+8)][2·pair, +1].
template <class T>
void emulated_mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Operands {
        uint32_t a[4], b[2];
    } mine, all[32];
    std::memcpy(mine.a, a, sizeof mine.a);
    std::memcpy(mine.b, b, sizeof mine.b);
    std::memcpy(all, exchange(&mine, sizeof mine), sizeof all);
    const int lane = thread_index() % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int pair = 0; pair < 4; ++pair)
            for (int upper = 0; upper < 2; ++upper) {
                float x[2], y[2];
                T::unpack(all[row * 4 + pair].a[2 * upper + i / 2], x[0], x[1]);
                T::unpack(all[column * 4 + pair].b[upper], y[0], y[1]);
                sum += x[0] * y[0] + x[1] * y[1];
            }
        c[i] += sum;
    }
}

// A number for mma_tf32: 10 bits behind the point, halves away from zero. `exact`: it has no more.
template <bool exact>
uint32_t to_tf32(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return exact || x != x ? bits : bits + 0x1000;
}

// c += a · b in the register layout of PTX's mma.m16n8k8: a lane holds a[row (+8)][column (+4)],
// b[column (+4)][row], c[row (+8)][2·column, +1], with row = lane / 4 and column = lane % 4.
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Operands {
        uint32_t a[4], b[2];
    } mine, all[32];
    std::memcpy(mine.a, a, sizeof mine.a);
    std::memcpy(mine.b, b, sizeof mine.b);
    std::memcpy(all, exchange(&mine, sizeof mine), sizeof all);
    const auto value = [](uint32_t bits) {
        bits &= 0xffffe000u;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    };
    const int lane = thread_index() % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int inner = 0; inner < 8; ++inner)
            sum += value(all[row * 4 + inner % 4].a[inner / 4 * 2 + i / 2]) *
                   value(all[column * 4 + inner % 4].b[inner / 4]);
        c[i] += sum;
    }
}

template <class T>
void unpack_words(uint32_t word, float& low, float& high) {
    low = T::widen(static_cast<uint16_t>(word));
    high = T::widen(static_cast<uint16_t>(word >> 16));
}
template <class T>
uint32_t pack_words(float low, float high) {
    return T::narrow(low) | static_cast<uint32_t>(T::narrow(high)) << 16;
}

template <class T>
uint32_t product_words(uint32_t a, uint32_t b) {
    float x[2], y[2];
    T::unpack(a, x[0], x[1]), T::unpack(b, y[0], y[1]);
    return T::pack(x[0] * y[0], x[1] * y[1]);
}

inline void BF16::unpack(uint32_t word, float& low, float& high) {
    unpack_words<BF16>(word, low, high);
}
inline uint32_t BF16::pack(float low, float high) { return pack_words<BF16>(low, high); }
inline uint32_t BF16::product(uint32_t a, uint32_t b) { return product_words<BF16>(a, b); }
inline void BF16::mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulated_mma<BF16>(c, a, b);
}
inline void F16::unpack(uint32_t word, float& low, float& high) {
    unpack_words<F16>(word, low, high);
}
inline uint32_t F16::pack(float low, float high) { return pack_words<F16>(low, high); }
inline uint32_t F16::product(uint32_t a, uint32_t b) { return product_words<F16>(a, b); }
inline void F16::mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulated_mma<F16>(c, a, b);
}

}  // namespace variator::cuda
