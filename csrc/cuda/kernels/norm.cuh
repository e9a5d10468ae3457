// RMSNorm and LayerNorm of the rows in a quad of slots: their addresses, statistics, normed values.
#pragma once

#include "kernels/tokens.cuh"

namespace variator::cuda {

// The rows of this lane's group, one per slot.
struct QuadRows {
    int token[quad];  // negative: no token to be merged
    float mean[quad], rstd[quad];

    static VARIATOR_DEVICE QuadRows of(const TileTokens& tokens, int group, int first_slot) {
        QuadRows rows;
        VARIATOR_UNROLL
        for (int i = 0; i < quad; ++i) {
            rows.token[i] = tokens.code[first_slot + i][group];
            rows.mean[i] = 0, rows.rstd[i] = 1;
        }
        return rows;
    }

    // Loads the rows of x at `column`; zeros where there is no token or no column.
    VARIATOR_DEVICE void load(const void* x, int64_t stride, int64_t column, bool inside,
                              Vec16 (&out)[quad]) const {
        VARIATOR_UNROLL
        for (int i = 0; i < quad; ++i)
            out[i] = inside && token[i] >= 0 ? load16_once(element(x, token[i] * stride + column))
                                             : zero16();
    }
};

// Mean and rstd of the rows, from the moments each lane has of its own columns. `shared` holds
// [warps][tile_rows]. Called by all threads.
VARIATOR_DEVICE void join_statistics(const Lane& at, const NormParams& norm, int64_t d,
                                     Moments (&mine)[quad], Moments* shared, QuadRows& rows) {
    const bool centred = norm.kind == Norm::layer;
    VARIATOR_UNROLL
    for (int i = 0; i < quad; ++i) {
        VARIATOR_UNROLL
        for (int lanes = 1; lanes < 4; lanes *= 2)
            mine[i].join({shuffle_xor(mine[i].count, lanes), shuffle_xor(mine[i].mean, lanes),
                          shuffle_xor(mine[i].squares, lanes)},
                         centred);
        if (at.part == 0) shared[at.warp * tile_rows + i * tile_groups + at.row] = mine[i];
    }
    block_sync();
    VARIATOR_UNROLL
    for (int i = 0; i < quad; ++i) {
        Moments all{0, 0, 0};
        for (int warp = 0; warp < warps; ++warp)
            all.join(shared[warp * tile_rows + i * tile_groups + at.row], centred);
        rows.mean[i] = all.mean;
        rows.rstd[i] = norm_rstd(norm, all.squares, d);
    }
    block_sync();
}

// Norms 8 elements in fp32 and rounds them to T, the storage type of h.
template <class T>
VARIATOR_DEVICE Vec16 normed(const Vec16& x, float mean, float rstd, const float (&weight)[8],
                             const float (&bias)[8]) {
    float h[8];
    widen<T>(x, h);
    VARIATOR_UNROLL
    for (int i = 0; i < 8; ++i) h[i] = (h[i] - mean) * rstd * weight[i] + bias[i];
    return narrow<T>(h);
}

// Norms the rows of a quad at `column`; rows without a token stay 0.
template <class T>
VARIATOR_DEVICE void norm_quad(const NormParams& norm, const QuadRows& rows, int64_t column,
                               bool inside, Vec16 (&x)[quad]) {
    if (norm.kind == Norm::none || !inside) return;
    float weight[8], bias[8];
    load8<T>(norm.weight, column, 1, weight);
    load8<T>(norm.bias, column, 0, bias);
    VARIATOR_UNROLL
    for (int i = 0; i < quad; ++i)
        if (rows.token[i] >= 0) x[i] = normed<T>(x[i], rows.mean[i], rows.rstd[i], weight, bias);
}

// A sum of squares by tensor cores: the diagonal of x · xᵀ, with two words of a row's four as row
// `low` and two as row `high`, as they lie. Two instructions do the work of sixteen.
struct Squares {
    float low[4] = {}, high[4] = {};

    template <class T>
    VARIATOR_DEVICE void add(const Vec16& x) {
        T::mma(low, x.word, {x.word[0], x.word[2]});
        T::mma(high, x.word, {x.word[1], x.word[3]});
    }
    // In the lane whose part is row / 2.
    VARIATOR_DEVICE float sum(const Lane& at) const {
        return at.row % 2 == 0 ? low[0] + high[2] : low[1] + high[3];
    }
};

template <class T>
VARIATOR_DEVICE void join_moments(const NormParams& norm, const Vec16 (&x)[quad], bool inside,
                                  Moments (&moments)[quad]) {
    if (!inside) return;
    VARIATOR_UNROLL
    for (int i = 0; i < quad; ++i) {
        float v[8];
        widen<T>(x[i], v);
        moments[i].join(Moments::of(v, norm.kind == Norm::layer), norm.kind == Norm::layer);
    }
}

}  // namespace variator::cuda
