// 8 fp32 lanes: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace variator {
namespace VARIATOR_ISA {

struct Vec {
    using Scalar = float;
    static constexpr int width = 8;
    static constexpr int tile_rows = 6, tile_vectors = 2;  // 12 sums, 2 + 1 operands, 16 registers
    __m256 v;

    static Vec zero() { return {_mm256_setzero_ps()}; }
    static Vec set(float x) { return {_mm256_set1_ps(x)}; }
    static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    static __m256i first(int n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
    void store(float* p, int n) const { _mm256_maskstore_ps(p, first(n), v); }

    static Vec widen_bf16(__m128i h) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
    }
    // Round to nearest, ties to even; NaN stays NaN.
    __m128i narrow_bf16() const {
        __m256i bits = _mm256_castps_si256(v);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
        return _mm_packus_epi32(_mm256_castsi256_si128(rounded),
                                _mm256_extracti128_si256(rounded, 1));
    }
    static __m128i load_halves(const uint16_t* p) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    }
    static __m128i load_halves(const uint16_t* p, int n) {
        alignas(16) uint16_t part[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (int i = 0; i < n; ++i) part[i] = p[i];
        return load_halves(part);
    }
    static void store_halves(uint16_t* p, __m128i h) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
    }
    static void store_halves(uint16_t* p, __m128i h, int n) {
        alignas(16) uint16_t part[8];
        store_halves(part, h);
        for (int i = 0; i < n; ++i) p[i] = part[i];
    }
    static Vec load_bf16(const uint16_t* p) { return widen_bf16(load_halves(p)); }
    static Vec load_bf16(const uint16_t* p, int n) { return widen_bf16(load_halves(p, n)); }
    void store_bf16(uint16_t* p) const { store_halves(p, narrow_bf16()); }
    void store_bf16(uint16_t* p, int n) const { store_halves(p, narrow_bf16(), n); }
    static Vec load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(load_halves(p))}; }
    static Vec load_f16(const uint16_t* p, int n) { return {_mm256_cvtph_ps(load_halves(p, n))}; }
    void store_f16(uint16_t* p) const { store_halves(p, _mm256_cvtps_ph(v, 0)); }
    void store_f16(uint16_t* p, int n) const { store_halves(p, _mm256_cvtps_ph(v, 0), n); }

    friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
    friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
    static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static Vec reciprocal(Vec a) { return set(1.0f) / a; }
    static Vec minimum(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
    static Vec maximum(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
    static Vec absolute(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
    static Vec round(Vec a) { return {_mm256_round_ps(a.v, 8)}; }
    static Vec exp2_whole(Vec n) {
        __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(e, 23))};
    }
    static Vec less_select(Vec a, Vec b, Vec yes, Vec no) {
        return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
    }
    static Vec copy_sign(Vec magnitude, Vec sign) {
        __m256 mask = _mm256_set1_ps(-0.0f);
        return {_mm256_or_ps(_mm256_andnot_ps(mask, magnitude.v), _mm256_and_ps(mask, sign.v))};
    }
    static Vec fraction(Vec a) { return {_mm256_sub_ps(a.v, _mm256_floor_ps(a.v))}; }
    static Vec scale_exp2(Vec p, Vec x) {
        const Vec least = set(-126.0f);
        const Vec power = exp2_whole({_mm256_floor_ps(maximum(least, x).v)});
        return less_select(x, least, zero(), p * power);
    }
    static void interleave(Vec a, Vec b, Vec& low, Vec& high) {
        const __m256 lower = _mm256_unpacklo_ps(a.v, b.v), upper = _mm256_unpackhi_ps(a.v, b.v);
        low = {_mm256_permute2f128_ps(lower, upper, 0x20)};
        high = {_mm256_permute2f128_ps(lower, upper, 0x31)};
    }
    float sum() const {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
    }
    // Rounded to whole numbers, `zero` added, cut to 0 .. 255.
    void store_uint8(uint8_t* p, int32_t zero) const {
        const __m256i whole = _mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(zero));
        const __m128i halves =
            _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
    }
    float largest() const {
        __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        s = _mm_max_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
    }
};

// 8 int32 lanes: sums of products of four uint8 with four int8.
struct IntVec {
    static constexpr int width = 8;
    static constexpr int tile_rows = 5, tile_vectors = 2;  // 10 sums, 2 + 1 operands, the ones
    // Two products of uint8 with these fit into int16, where the instruction would saturate.
    static constexpr int weight_levels = 64;
    __m256i v;

    static IntVec zero() { return {_mm256_setzero_si256()}; }
    static IntVec set(int32_t x) { return {_mm256_set1_epi32(x)}; }
    static IntVec load(const void* p) {
        return {_mm256_loadu_si256(static_cast<const __m256i*>(p))};
    }
    void store(int32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
    static IntVec add_products(IntVec sum, IntVec a, IntVec b) {
        const __m256i pairs = _mm256_maddubs_epi16(a.v, b.v);
        return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
    }
    friend IntVec operator-(IntVec a, IntVec b) { return {_mm256_sub_epi32(a.v, b.v)}; }
    friend IntVec operator*(IntVec a, IntVec b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
    Vec to_float() const { return {_mm256_cvtepi32_ps(v)}; }
};

}  // namespace VARIATOR_ISA
}  // namespace variator
