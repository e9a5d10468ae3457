// 16 fp32 lanes: AVX-512 F/BW/DQ/VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace variator {
namespace VARIATOR_ISA {

struct Vec {
    using Scalar = float;
    static constexpr int width = 16;
    static constexpr int tile_rows = 6, tile_vectors = 4;  // 24 sums, 4 + 1 operands, 32 registers
    __m512 v;

    static Vec zero() { return {_mm512_setzero_ps()}; }
    static Vec set(float x) { return {_mm512_set1_ps(x)}; }
    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
    static Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
    void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }

    static Vec widen_bf16(__m256i h) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
    }
    // Round to nearest, ties to even; NaN stays NaN.
    __m256i narrow_bf16() const {
#ifdef __AVX512BF16__
        return (__m256i)_mm512_cvtneps_pbh(v);
#else
        __m512i bits = _mm512_castps_si512(v);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
    }
    static Vec load_bf16(const uint16_t* p) {
        return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static Vec load_bf16(const uint16_t* p, int n) {
        return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p));
    }
    void store_bf16(uint16_t* p) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16());
    }
    void store_bf16(uint16_t* p, int n) const {
        _mm256_mask_storeu_epi16(p, first(n), narrow_bf16());
    }
    static Vec load_f16(const uint16_t* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    static Vec load_f16(const uint16_t* p, int n) {
        return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
    }
    void store_f16(uint16_t* p) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0));
    }
    void store_f16(uint16_t* p, int n) const {
        _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(v, 0));
    }

    friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
    friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
    static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    // 1 / a for a from 1 on: a division takes as long as a dozen products.
    static Vec reciprocal(Vec a) {
        const __m512 r = _mm512_rcp14_ps(a.v);
        return {_mm512_mul_ps(r, _mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(2.0f)))};
    }
    static Vec minimum(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
    static Vec maximum(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
    static Vec absolute(Vec a) { return {_mm512_abs_ps(a.v)}; }
    static Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, 8)}; }
    // 2^n for a whole n within the exponent's range.
    static Vec exp2_whole(Vec n) {
        __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(e, 23))};
    }
    // a < b ? yes : no; an unordered comparison takes no.
    static Vec less_select(Vec a, Vec b, Vec yes, Vec no) {
        return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
    }
    static Vec copy_sign(Vec magnitude, Vec sign) {
        __m512i mask = _mm512_set1_epi32(static_cast<int>(0x80000000u));
        return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(
            mask, _mm512_castps_si512(sign.v), _mm512_castps_si512(magnitude.v), 0xCA))};
    }
    // a - floor(a), and p · 2^floor(x): 0 for x < -126, below the smallest normal number.
    static Vec fraction(Vec a) { return {_mm512_reduce_ps(a.v, 9)}; }
    static Vec scale_exp2(Vec p, Vec x) {
        const __mmask16 normal = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
        return {_mm512_maskz_scalef_ps(normal, p.v, x.v)};
    }
    // The lanes of a and b in turn: the first halves in low, the second ones in high.
    static void interleave(Vec a, Vec b, Vec& low, Vec& high) {
        const __m512i first =
            _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        low = {_mm512_permutex2var_ps(a.v, first, b.v)};
        high = {_mm512_permutex2var_ps(a.v, second, b.v)};
    }
    float sum() const { return _mm512_reduce_add_ps(v); }
    float largest() const { return _mm512_reduce_max_ps(v); }
    // Rounded to whole numbers, `zero` added, cut to 0 .. 255.
    void store_uint8(uint8_t* p, int32_t zero) const {
        const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(zero));
        const __m512i positive = _mm512_max_epi32(whole, _mm512_setzero_si512());
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(positive));
    }
};

// 16 int32 lanes: sums of products of four uint8 with four int8.
struct IntVec {
    static constexpr int width = 16;
    static constexpr int tile_rows = 6, tile_vectors = 4;
#ifdef __AVX512VNNI__
    static constexpr int weight_levels = 127;
#else
    // Two products of uint8 with these fit into int16, where the instruction would saturate.
    static constexpr int weight_levels = 64;
#endif
    __m512i v;

    static IntVec zero() { return {_mm512_setzero_si512()}; }
    static IntVec set(int32_t x) { return {_mm512_set1_epi32(x)}; }
    static IntVec load(const void* p) { return {_mm512_loadu_si512(p)}; }
    void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
    static IntVec add_products(IntVec sum, IntVec a, IntVec b) {
#ifdef __AVX512VNNI__
        return {_mm512_dpbusd_epi32(sum.v, a.v, b.v)};
#else
        const __m512i pairs = _mm512_maddubs_epi16(a.v, b.v);
        return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#endif
    }
    friend IntVec operator-(IntVec a, IntVec b) { return {_mm512_sub_epi32(a.v, b.v)}; }
    friend IntVec operator*(IntVec a, IntVec b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
    Vec to_float() const { return {_mm512_cvtepi32_ps(v)}; }
};

#ifdef __AVX512BF16__
#define VARIATOR_BF16_PRODUCTS 1
// sum += a pair by pair, the pair of A the same in every lane.
inline __attribute__((always_inline)) Vec dot_pairs(Vec sum, const uint16_t* a, const uint16_t* b) {
    int pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    __m512i bits = _mm512_loadu_si512(b);
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)bits)};
}
// x as bf16, and what that leaves of it.
inline __attribute__((always_inline)) __m256i take_bf16(Vec& x) {
    const __m256i taken = x.narrow_bf16();
    x = x - Vec::widen_bf16(taken);
    return taken;
}
inline __attribute__((always_inline)) void store_bits(uint16_t* to, __m256i bits) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
}
// Pairs (low, high) lane by lane.
inline __attribute__((always_inline)) void store_pairs(uint16_t* to, __m256i low, __m256i high) {
    const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
    _mm512_storeu_si512(to, _mm512_or_si512(_mm512_cvtepu16_epi32(low), upper));
}
#endif

}  // namespace VARIATOR_ISA
}  // namespace variator
