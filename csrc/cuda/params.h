// The kernels' parameters, a plain struct per kernel. Pointers are to device memory that the caller
// owns; sizes and strides count elements. T below is the storage type, bf16 or fp16; rows of T
// start at multiples of 16 bytes, so every hidden size and row stride is a multiple of 8.
#pragma once

#include <cstdint>

#include "../enums.h"

#if defined(__CUDACC__)
#define VARIATOR_HD __host__ __device__ __forceinline__
#else
#define VARIATOR_HD inline
#endif

namespace variator::cuda {

using variator::Activation;
using variator::DType;
using variator::Norm;
using variator::Phi;

constexpr int64_t max_ratio = 32;        // a warp's lanes are a group's slots in the softmax
constexpr int64_t max_bottleneck = 512;  // shared memory of the decompress

// Which tokens lie in the k slots of each group, in one of three forms. Every token has exactly one
// slot, padding too, so a kernel that walks over all slots writes every row. Sizes fit 32 bits.
//   plain:  rows of n tokens, each cut into per_row groups; no array.
//   masked: the same from start[row] on, a row's first real token, wrapping around at its end.
//   listed: group i merges the tokens start[i] .. + span[i]-1 of one list of n, less those whose
//           mask byte is 0, and owns owned[i], wrapping around at its end; groups from `count` on
//           merge nothing. The token of a kept group stays whole.
struct Groups {
    const int64_t* start;
    const int64_t* span;
    const int64_t* owned;
    const uint8_t* mask;  // one byte per token, or null: all real; not in plain form
    const uint8_t* kept;  // listed: one byte per group, or null: none
    int64_t n, per_row;
    int64_t count;     // groups that have a merged vector
    int64_t launched;  // groups to walk over
    int64_t k;

    struct Slot {
        int64_t token;  // -1: none
        bool real;      // false: padding
    };
    VARIATOR_HD Slot slot(int64_t group, int64_t j) const {
        if (group >= launched || j >= k) return {-1, false};
        if (owned != nullptr) {
            if (j >= owned[group]) return {-1, false};
            int64_t token = start[group] + j;
            if (token >= n) token -= n;
            return {token, j < span[group] && (mask == nullptr || mask[token] != 0)};
        }
        const uint32_t row = static_cast<uint32_t>(group) / static_cast<uint32_t>(per_row);
        int64_t at = (group - row * per_row) * k + j;
        if (at >= n) return {-1, false};
        if (start == nullptr) return {row * n + at, true};
        at += start[row];
        const int64_t token = row * n + (at < n ? at : at - n);
        return {token, mask[token] != 0};
    }
    VARIATOR_HD bool whole(int64_t group) const {
        return kept != nullptr && group < launched && kept[group] != 0;
    }
    // The token to be merged, or -1.
    VARIATOR_HD int64_t token(int64_t group, int64_t j) const {
        const Slot found = slot(group, j);
        return found.real ? found.token : -1;
    }
};

// A bias or a norm's weight: fp32 where `wide`, else T.
struct Vector {
    const void* data;
    bool wide;
};

// h = norm(x) of rows x [tokens, d]: (x - mean) * rstd * weight + bias.
struct NormParams {
    Norm kind;
    Vector weight;  // [d] or null
    Vector bias;    // [d] or null
    float eps;
};

struct MergeParams {
    DType dtype;
    Groups groups;
    int64_t d, r;   // r: a multiple of 64, zero rows below; 0 without `projected`
    const void* x;  // T [tokens, d], rows x_stride apart
    int64_t x_stride;
    NormParams norm;
    const void* merge_weight;  // T [k, k*d]
    Vector merge_bias;         // [k]
    const void* projection;    // T [r, d], rows projection_stride apart: W_1h; or null
    int64_t projection_stride;
    int64_t projected_columns;  // columns of `projected`, at most r
    void* merged;               // out T [groups, d]
    float* projected;           // out [tokens, projected_columns], 0 for padding; or null
    float* weights;             // out [groups, k], the softmax, or null
};

struct DecompressParams {
    DType dtype;
    Groups groups;
    int64_t d,
        r;  // r: a multiple of 64; columns of zeros in w1u's rows and w2 beyond the real ones
    Phi phi;
    const void* u;           // T [groups, d]
    const float* projected;  // [tokens, projected_columns]: W_1h h
    int64_t projected_columns;
    const void* w1u;  // T [r, d], rows w1u_stride apart
    int64_t w1u_stride;
    Vector b1;             // [r]
    const void* w2;        // T [d, r]
    Vector b2;             // [d]
    const void* residual;  // T [tokens, d], rows residual_stride apart, or null
    int64_t residual_stride;
    void* y;  // out T [tokens, d]; for padding the residual, or 0
};

struct MergeBackwardParams {
    DType dtype;
    Groups groups;
    int64_t d, r;
    const void* x;
    int64_t x_stride;
    NormParams norm;
    const float* weights;              // [groups, k], from the forward
    const void* merge_weight;          // T [k, k*d]
    const void* projection_transpose;  // T [d, r], or null
    int64_t projected_columns;
    const void* d_merged;      // T [groups, d]
    const float* d_projected;  // [tokens, projected_columns] or null
    void* dx;                  // out T [tokens, d], 0 for padding
    float* d_scores;           // out [groups, k]
    float* moments;            // out [groups, k, 2]: mean and rstd of each slot's row
    float* d_norm_weight;      // out [tiles, d], to be summed over the tiles, or null
    float* d_norm_bias;        // out [tiles, d], or null
};

struct DecompressBackwardParams {
    DType dtype;
    Groups groups;
    int64_t d, r;
    Phi phi;
    const void* u;
    const float* projected;
    int64_t projected_columns;
    const void* w1u;  // T [r, d], rows w1u_stride apart
    int64_t w1u_stride;
    const void* w1u_transpose;  // T [d, r]
    const void* w2_transpose;   // T [r, d]
    Vector b1;                  // [r]
    const void* dy;             // T [tokens, d], rows dy_stride apart
    int64_t dy_stride;
    void* du;            // out T [groups, d]
    float* d_projected;  // out [tokens, projected_columns], 0 for padding
    float* bottleneck;   // out [tokens, projected_columns]: t, 0 for padding
    float* d_q;          // out [groups, projected_columns]: gradient of W_1u u + b_1
};

// out[s] = Σ left[m]ᵀ right[m] over part s of the rows m: one slot of a share of the groups, or the
// groups themselves. To be added up over shares and, but for the scores' columns, over slots.
struct WeightGradientParams {
    DType dtype;
    Groups groups;
    bool by_group;      // rows belong to groups, one each, else to tokens
    const float* left;  // [tokens or groups, left_columns], or null without columns
    int64_t left_columns;
    const float* scores;  // [groups, score_columns]: columns behind those of `left`, or null
    int64_t score_columns;
    bool ones;          // a last column of ones
    const void* right;  // T [tokens or groups, d], rows right_stride apart, under a norm
    int64_t right_stride, d;
    NormParams norm;
    const float* moments;  // [groups, k, 2] for the norm; null if there is none
    int64_t shares;
    float* out;  // [shares, slots, columns, d]; one slot where rows are groups
};

// out [rows, columns] = activation(a · weightᵀ + bias) [* factor].
struct GemmParams {
    DType dtype;
    int64_t rows, columns, inner;
    const void* a;       // T [rows, inner]
    const void* weight;  // T [columns, inner]
    const void* bias;    // T [columns] or null
    Activation activation;
    const void* factor;  // T [rows, columns], multiplies the result, or null
    void* out;           // T [rows, columns]
};

// The whole sublayer, in one launch (for r = 64) or in several. Weights, norm, x, y: as above.
struct LayerParams {
    MergeParams merge;  // merged, projected: workspace; weights: null
    int64_t f;
    const void* w_in;    // T [f, d]
    const void* w_gate;  // T [f, d] or null
    const void* w_out;   // T [d, f]
    const void* b_in;    // T [f] or null
    const void* b_gate;  // T [f] or null
    const void* b_out;   // T [d] or null
    Activation activation;
    void* inner;  // workspace T [groups, f]
    void* gated;  // workspace T [groups, f]: several launches with a gate; else null
    void* u;      // workspace T [groups, d]
    DecompressParams decompress;
    // Of one launch:
    float* partial;         // workspace [splits, groups, d]
    int64_t splits;         // parts that the down projection's sum over f is split into
    int64_t blocks_a_part;  // column blocks that a thread block decompresses at a time
};

}  // namespace variator::cuda
