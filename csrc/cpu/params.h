// What a kernel is told: one plain struct each. Addresses are of caller-owned memory, sizes and
// strides count elements, and every size is 64-bit.
#pragma once

#include <cstdint>

#include "../enums.h"

namespace variator {

// Groups of up to k neighbouring tokens. Group i holds the tokens start[i] .. start[i]+span[i]-1 of
// the flat token list, less those whose mask byte is 0. The tokens of a kept group stay whole.
struct Groups {
    const int64_t* start;
    const int64_t* span;
    const uint8_t* mask;  // a byte a token, or null: all real
    const uint8_t* kept;  // a byte a group, or null: none
    int64_t count;
    int64_t k;

    // Always inlined: a shared copy of it could hold instructions of one set alone.
    __attribute__((always_inline)) bool has(int64_t group, int64_t slot) const {
        return slot < span[group] && (mask == nullptr || mask[start[group] + slot] != 0);
    }
    __attribute__((always_inline)) bool whole(int64_t group) const {
        return kept != nullptr && kept[group] != 0;
    }
};

// Up to this ratio the scores are k dot products a token, made while the token is in cache; a
// matrix product would pad k to whole vectors. Above it, panels are read less often than rows.
constexpr int64_t direct_scores = 8;

// "acc" below is float, or double where the storage type is double.
struct MergeParams {
    DType dtype;
    int threads;
    Groups groups;
    int64_t d, r;   // r = 0: no projection wanted
    const void* x;  // [tokens, d], rows x_stride apart
    int64_t x_stride;
    Norm norm;
    const void* norm_weight;  // acc [d] or null
    const void* norm_bias;    // acc [d] or null
    double eps;
    bool folded;                    // norm_weight is already in merge_weight and projection_packed;
                                    // for norms without mean and bias
    const void* merge_weight;       // W_c: acc [k, k*d] for k <= direct_scores, else its pack
    const void* merge_bias;         // acc [k]
    const void* projection_packed;  // pack of W_1h^T, or null
    void* merged;                   // out [groups, d]
    void* projected;                // out acc [tokens, r], or null
    void* softmax;                  // out acc [groups, k], the softmax, or null
    void* poison;                   // out acc [groups]: 0, or NaN where a token holds NaN; or null
};

struct MergeBackwardParams {
    DType dtype;
    int threads;
    Groups groups;
    int64_t d, r;
    const void* x;
    int64_t x_stride;
    Norm norm;
    const void* norm_weight;
    const void* norm_bias;
    double eps;
    const void* softmax;                 // acc [groups, k], from the forward
    const void* merge_packed_rows;       // pack of W_c by slot, inner dimension k
    const void* projection_packed_rows;  // pack of W_1h [r, d], inner dimension r
    const void* d_merged;                // [groups, d]
    const void* d_projected;             // acc [tokens, r] or null
    void* dx;                            // out [tokens, d]; rows of absent tokens untouched
    void* d_merge_weight;                // out acc [k, k, d] or null: [slot][score][d]
    void* d_merge_bias;                  // out acc [k]
    void* d_projection;                  // out acc [r, d] or null
    void* d_norm_weight;                 // out acc [d] or null
    void* d_norm_bias;                   // out acc [d] or null
};

struct DecompressParams {
    DType dtype;
    int threads;
    Groups groups;
    int64_t d, r;
    Phi phi;
    const void* u;           // [groups, d]
    const void* projected;   // acc [tokens, r]: W_1h h
    const void* w1u_packed;  // pack of W_1u^T
    const void* b1;          // acc [r]
    const void* w2_packed;   // pack of W_2^T, inner dimension r
    const void* b2;          // acc [d]
    const void* poison;      // acc [groups], added to u: the library's activations may turn NaN
                             // into 0 between merge and decompress; or null
    const void* residual;    // [tokens, d], rows residual_stride apart, or null
    int64_t residual_stride;
    void* y;  // out [tokens, d]; rows outside the groups untouched
};

struct DecompressBackwardParams {
    DType dtype;
    int threads;
    Groups groups;
    int64_t d, r;
    Phi phi;
    const void* u;
    const void* projected;
    const void* w1u_packed;
    const void* b1;
    const void* w2_packed_rows;   // pack of W_2 [d, r], inner dimension d
    const void* w1u_packed_rows;  // pack of W_1u [r, d], inner dimension r
    const void* dy;               // [tokens, d], rows dy_stride apart
    int64_t dy_stride;
    void* du;           // out [groups, d]
    void* d_projected;  // out acc [tokens, r]; rows of absent tokens untouched
    void* d_w1u;        // out acc [r, d]
    void* d_b1;         // out acc [r]
    void* d_w2;         // out acc [r, d]: transposed
    void* d_b2;         // out acc [d]
};

// `matrices` right-hand sides B [inner, columns] of products A·B into panels (gemm.h); element
// (i, c) of the m-th at source[m * matrix_stride + i * inner_stride + c * column_stride].
struct PackParams {
    DType dtype;  // float64: source and panels are double; else float
    bool bf16;    // panels for products of bf16 pairs, where the instruction set has them
    int64_t matrices, matrix_stride;
    int64_t inner, inner_stride;
    int64_t columns, column_stride;
    const void* source;
    void* packed;
};

// A tensor [rows, tokens, heads, d] with unit inner stride.
struct HeadRows {
    const void* data;
    int64_t row, token, head;  // strides
};

// "positions" and "pattern": ops/grouped_attention/relative.py: DistanceBias.
struct AttentionParams {
    DType dtype;
    AttentionPath path;
    int threads;
    int64_t rows, queries, keys, heads, kv_heads, d;
    HeadRows q, k, v;
    double scale;
    const void* bias;      // acc [rows, keys] or null
    const int32_t* first;  // [rows, keys] or null: from query 0
    const int32_t* last;   // [rows, keys] or null: to the last query
    const void* terms;     // acc [patterns, term_heads, width] or null
    int64_t term_heads, width, origin;
    const double* query_positions;  // [rows, queries]
    const double* key_positions;    // [rows, keys]
    const int64_t* pattern;         // [rows, keys] or null: all 0
    void* out;                      // out [rows, queries, heads, d]; 0 where no key is visible
};

struct AttentionBackwardParams : AttentionParams {  // without path and out
    HeadRows d_out;
    void* d_q;     // out [rows, queries, heads, d]
    void* d_k;     // out [rows, keys, kv_heads, d]
    void* d_v;     // out, as d_k
    void* d_bias;  // out acc [rows, keys], or null
};

// A weight [columns, inner] of int8 into panels for int8_linear.
struct Int8PackParams {
    int64_t inner, columns;
    const int8_t* source;  // -weight_levels .. weight_levels
    int8_t* packed;        // int8_packed_bytes
};

// y = activation(norm(x) · weightᵀ + bias) [* other] [+ residual]: int8 weights, rows quantised on
// the way.
struct Int8LinearParams {
    DType dtype;  // of x, other and y; not float64
    int threads;
    int64_t rows, inner, columns;
    const void* x;  // rows x_stride apart
    int64_t x_stride;
    const int8_t* packed;
    // [columns, padded to 16]: the sum of a column's int8, and what 1 of them stands for
    const int32_t* sums;
    const float* scales;
    const float* bias;  // the same, or null
    Activation activation;
    Norm norm;
    const float* norm_weight;  // [inner] or null
    const float* norm_bias;    // [inner] or null
    double eps;
    const void* other;     // [rows, columns] or null
    const void* residual;  // [rows, columns] or null
    void* y;               // out [rows, columns]
};

// The same in floating point.
struct RowsLinearParams {
    DType dtype;  // of x, other, residual and y; not float64
    int threads;
    int64_t rows, inner, columns;
    const void* x;  // rows x_stride apart
    int64_t x_stride;
    const void* packed;  // the pack of weightᵀ; of bf16 pairs for bfloat16, where there are such
    const float* bias;   // [columns, padded to 16] or null
    Activation activation;
    Norm norm;
    const float* norm_weight;  // [inner] or null
    const float* norm_bias;    // [inner] or null
    double eps;
    const void* other;     // [rows, columns] or null
    const void* residual;  // [rows, columns] or null
    void* y;               // out [rows, columns]
};

struct NormRowsParams {
    DType dtype;
    int threads;
    int64_t rows, d;
    const void* x;  // rows x_stride apart
    int64_t x_stride;
    Norm norm;
    const void* norm_weight;  // acc [d] or null
    const void* norm_bias;    // acc [d] or null
    double eps;
    void* y;  // out [rows, d]
};

// The entry points of one instruction set.
struct Kernels {
    const char* name;
    void (*merge)(const MergeParams&);
    void (*merge_backward)(const MergeBackwardParams&);
    void (*decompress)(const DecompressParams&);
    void (*decompress_backward)(const DecompressBackwardParams&);
    void (*attention)(const AttentionParams&);
    void (*attention_backward)(const AttentionBackwardParams&);
    int64_t (*packed_bytes)(const PackParams&);
    void (*pack)(const PackParams&);
    int64_t (*int8_packed_bytes)(const Int8PackParams&);
    void (*int8_pack)(const Int8PackParams&);
    void (*int8_linear)(const Int8LinearParams&);
    void (*rows_linear)(const RowsLinearParams&);
    void (*norm_rows)(const NormRowsParams&);
    int int8_weight_levels;
    bool has_double;
};

}  // namespace variator
