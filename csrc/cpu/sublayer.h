// Whole sublayers, one call each: their kernels one after another, with what lies in between in
// memory of their own. What is known before a call is kept: weights, sizes, norms.
//
// Products are those of this package; not float64.
#pragma once

#include <optional>

#include "dispatch.h"

namespace variator {

// A norm as Python hands it over; vectors in acc.
struct NormParams {
    Norm kind = Norm::none;
    const void* weight = nullptr;
    const void* bias = nullptr;
    double eps = 0;
    bool folded = false;
};

// Rows of vectors; `stride` elements lie between two.
struct Rows {
    int64_t count;
    const void* data;
    int64_t stride;
};

// A packed weight [columns, inner] with its bias: of int8 if it has scales.
struct Linear {
    const Kernels* kernels;
    int64_t inner, columns;
    const void* packed;
    const float* bias;    // [columns, padded to 16] or null, as the two below
    const int32_t* sums;  // Int8LinearParams
    const float* scales;
};

// What stands around a product, and where its result goes: [rows, columns], as other and residual.
struct Around {
    Activation activation = Activation::none;
    NormParams norm = {};
    const void* other = nullptr;
    const void* residual = nullptr;
};
// How products of a call run.
struct How {
    DType dtype;
    int threads;
};
// Throws std::invalid_argument for float64 vectors and int8.
void multiply(const Linear& linear, const How& how, const Rows& x, const Around& around, void* y);

// FFN(g) of any number of vectors.
struct FfnProducts {
    Linear in, out;
    std::optional<Linear> gate;
    Activation activation;

    // `inner` is scratch of [rows, in.columns].
    void run(const How& how, const Rows& x, const NormParams& norm, const void* residual,
             void* inner, void* y) const;
};

// Norm, products, residual, norm.
struct DenseFfn {
    const Kernels* kernels;
    DType dtype;
    FfnProducts products;
    NormParams norm, behind;
    bool residual;  // then rows of x are contiguous

    void run(const Rows& x, void* y, int threads) const;
};

// Norm, merge, products, decompress, residual, norm.
struct CompressedFfn {
    const Kernels* kernels;
    FfnProducts products;
    MergeParams merge;            // but for what a call has of its own: threads, groups, x, outputs
    DecompressParams decompress;  // the same
    NormParams behind;            // with a residual alone: what lies in no group passes it by
    bool residual;

    // Groups without a slot are left out. `outside`: some token lies in no group.
    void run(const Rows& x, const Groups& groups, bool outside, void* y, int threads) const;
};

// Norm, attention, residual, norm.
struct AttentionSublayer {
    const Kernels* kernels;
    AttentionParams attention;  // of its own: heads and scale
    Linear in;                  // of queries; and of keys and values, where these are of tokens too
    std::optional<Linear> keys_values;  // of merged vectors
    Linear out;
    MergeParams merge;  // without W_1h
    NormParams norm, behind;
    bool residual;  // then rows of x are contiguous

    // `given` has rows, queries, keys and what holds of these; groups are of merged vectors.
    // `outside`: some token lies in no group; with a residual it comes out as it was.
    void run(const Rows& x, AttentionParams given, const Groups& groups, bool outside, void* y,
             int threads) const;
};

}  // namespace variator
