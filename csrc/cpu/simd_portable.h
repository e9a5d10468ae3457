// Plain C++ lanes that any compiler turns into what its target has; also double.
#pragma once

#include <cmath>
#include <cstdint>

namespace variator {
namespace VARIATOR_ISA {

inline float bits_to_float(uint32_t bits) {
    float f;
    __builtin_memcpy(&f, &bits, sizeof f);
    return f;
}
inline uint32_t float_to_bits(float f) {
    uint32_t bits;
    __builtin_memcpy(&bits, &f, sizeof bits);
    return bits;
}

inline float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }
inline uint16_t float_to_bf16(float f) {
    uint32_t bits = float_to_bits(f);
    if (f != f) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float f16_to_float(uint16_t h) {
    uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
    // Moves the exponent by scaling, which also gets subnormal numbers right.
    float f = rest >= 0x7c00 ? bits_to_float(0x7f800000u | ((rest & 0x3ff) << 13))
                             : bits_to_float(rest << 13) * 0x1p112f;
    return bits_to_float(float_to_bits(f) | sign);
}
inline uint16_t float_to_f16(float f) {
    uint32_t bits = float_to_bits(f), sign = (bits >> 16) & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    if (bits < 0x38800000) {  // subnormal in fp16: let the addition round
        uint32_t rounded = float_to_bits(bits_to_float(bits) + 0.5f) - 0x3f000000u;
        return static_cast<uint16_t>(sign | rounded);
    }
    bits += 0xc8000fffu + ((bits >> 13) & 1);
    return static_cast<uint16_t>(sign | (bits >> 13));
}

template <class T>
struct Lanes {
    using Scalar = T;
    static constexpr int width = 16 / sizeof(T);
    static constexpr int tile_rows = 4, tile_vectors = 2;
    T v[width];

    template <class F>
    static Lanes make(F f) {
        Lanes out;
        for (int i = 0; i < width; ++i) out.v[i] = f(i);
        return out;
    }
    static Lanes zero() { return set(0); }
    static Lanes set(T x) {
        return make([&](int) { return x; });
    }
    static Lanes load(const T* p) {
        return make([&](int i) { return p[i]; });
    }
    static Lanes load(const T* p, int n) {
        return make([&](int i) { return i < n ? p[i] : T(0); });
    }
    void store(T* p, int n = width) const {
        for (int i = 0; i < n; ++i) p[i] = v[i];
    }
    static Lanes load_bf16(const uint16_t* p, int n = width) {
        return make([&](int i) { return i < n ? T(bf16_to_float(p[i])) : T(0); });
    }
    static Lanes load_f16(const uint16_t* p, int n = width) {
        return make([&](int i) { return i < n ? T(f16_to_float(p[i])) : T(0); });
    }
    void store_bf16(uint16_t* p, int n = width) const {
        for (int i = 0; i < n; ++i) p[i] = float_to_bf16(static_cast<float>(v[i]));
    }
    void store_f16(uint16_t* p, int n = width) const {
        for (int i = 0; i < n; ++i) p[i] = float_to_f16(static_cast<float>(v[i]));
    }
    friend Lanes operator+(Lanes a, Lanes b) {
        return make([&](int i) { return a.v[i] + b.v[i]; });
    }
    friend Lanes operator-(Lanes a, Lanes b) {
        return make([&](int i) { return a.v[i] - b.v[i]; });
    }
    friend Lanes operator*(Lanes a, Lanes b) {
        return make([&](int i) { return a.v[i] * b.v[i]; });
    }
    friend Lanes operator/(Lanes a, Lanes b) {
        return make([&](int i) { return a.v[i] / b.v[i]; });
    }
    static Lanes fma(Lanes a, Lanes b, Lanes c) { return a * b + c; }
    // As the instructions do: the second operand if one is NaN.
    static Lanes maximum(Lanes a, Lanes b) {
        return make([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
    }
    static Lanes less_select(Lanes a, Lanes b, Lanes yes, Lanes no) {
        return make([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
    }
    static void interleave(Lanes a, Lanes b, Lanes& low, Lanes& high) {
        auto pick = [&](int i) { return i % 2 ? b.v[i / 2] : a.v[i / 2]; };
        low = make(pick);
        high = make([&](int i) { return pick(i + width); });
    }
    // Rounded to whole numbers, `zero` added, cut to 0 .. 255.
    void store_uint8(uint8_t* p, int32_t zero) const {
        for (int i = 0; i < width; ++i) {
            const long whole = __builtin_lrint(v[i]) + zero;
            p[i] = static_cast<uint8_t>(whole < 0 ? 0 : whole > 255 ? 255 : whole);
        }
    }
    T largest() const {
        T top = v[0];
        for (int i = 1; i < width; ++i) top = v[i] > top ? v[i] : top;
        return top;
    }
    T sum() const {
        T s = 0;
        for (int i = 0; i < width; ++i) s += v[i];
        return s;
    }
};

using Vec = Lanes<float>;
using VecDouble = Lanes<double>;
#define VARIATOR_HAS_DOUBLE 1

// int32 lanes: sums of products of four uint8 with four int8.
struct IntVec {
    static constexpr int width = 4;
    static constexpr int tile_rows = 4, tile_vectors = 2;
    static constexpr int weight_levels = 127;
    int32_t v[width];

    template <class F>
    static IntVec make(F f) {
        IntVec out;
        for (int i = 0; i < width; ++i) out.v[i] = f(i);
        return out;
    }
    static IntVec zero() { return set(0); }
    static IntVec set(int32_t x) {
        return make([&](int) { return x; });
    }
    static IntVec load(const void* p) {
        IntVec out;
        __builtin_memcpy(out.v, p, sizeof out.v);
        return out;
    }
    void store(int32_t* p) const { __builtin_memcpy(p, v, sizeof v); }
    static IntVec add_products(IntVec sum, IntVec a, IntVec b) {
        uint8_t left[4 * width];
        int8_t right[4 * width];
        __builtin_memcpy(left, a.v, sizeof left);
        __builtin_memcpy(right, b.v, sizeof right);
        for (int i = 0; i < 4 * width; ++i) sum.v[i / 4] += int32_t{left[i]} * right[i];
        return sum;
    }
    friend IntVec operator-(IntVec a, IntVec b) {
        return make([&](int i) { return a.v[i] - b.v[i]; });
    }
    friend IntVec operator*(IntVec a, IntVec b) {
        return make([&](int i) { return a.v[i] * b.v[i]; });
    }
    Vec to_float() const {
        return Vec::make([&](int i) { return static_cast<float>(v[i]); });
    }
};

}  // namespace VARIATOR_ISA
}  // namespace variator
