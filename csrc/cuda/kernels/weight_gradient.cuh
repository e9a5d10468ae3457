// Weight gradients: leftᵀ · right, summed over tokens or groups, in fp32 on CUDA cores. The order
// of the sum is fixed: each part adds its rows one after the other.
#pragma once

#include "kernels/norm.cuh"

namespace variator::cuda {

constexpr int gradient_tile_k = 16, gradient_tile_m = 64, gradient_tile_n = 128;

struct WeightGradientShared {
    float left[gradient_tile_k][gradient_tile_m];
    float right[gradient_tile_k][gradient_tile_n];
};

template <class T>
struct WeightGradientTile {
    const WeightGradientParams& p;
    WeightGradientShared& shared;
    const int64_t first_right, first_left, part;
    const int thread = thread_index();
    const int64_t slots = p.slot < 0 ? p.groups.k : 1;

    // Where row m lies in `left`, `right` and the moments; token < 0 if there is no such row.
    struct Row {
        int64_t group, slot, token;
    };
    VARIATOR_DEVICE Row row(int64_t m, int64_t last) const {
        if (m >= last) return {0, 0, -1};
        const int64_t group = m / slots, slot = p.slot < 0 ? m % slots : p.slot;
        // A group has a row of its own even if none of its tokens exists.
        const bool groups_alone = p.left_by_group && p.right_by_group;
        return {group, slot, groups_alone ? group : p.groups.token(group, slot)};
    }

    VARIATOR_DEVICE void run() {
        const int64_t each = ceil_div(p.groups.count, p.parts);
        const int64_t from = part * each * slots;
        const int64_t end = (part + 1) * each < p.groups.count ? (part + 1) * each : p.groups.count;
        const int64_t last = end * slots;
        const int row_of_left = thread / 16 * 4, column = thread % 16 * 4;
        float acc[4][8] = {};
        for (int64_t m = from; m < last; m += gradient_tile_k) {
            load(m, last);
            block_sync();
            VARIATOR_UNROLL
            for (int i = 0; i < gradient_tile_k; ++i) {
                float left[4], right[8];
                load4(&shared.left[i][row_of_left], left);
                load4(&shared.right[i][column], right);
                load4(&shared.right[i][column + gradient_tile_n / 2], right + 4);
                VARIATOR_UNROLL
                for (int a = 0; a < 4; ++a) VARIATOR_UNROLL
                for (int b = 0; b < 8; ++b) acc[a][b] += left[a] * right[b];
            }
            block_sync();
        }
        VARIATOR_UNROLL
        for (int a = 0; a < 4; ++a) {
            const int64_t c = first_left + row_of_left + a;
            if (c >= p.left_columns) continue;
            float* out = p.out + (part * p.left_columns + c) * p.out_stride;
            VARIATOR_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int64_t d = first_right + column + half * (gradient_tile_n / 2);
                if (d < p.d) store4(out + d, acc[a] + 4 * half);
            }
        }
    }

    // Loads 16 rows; each thread takes 8 columns of `right` and 4 of `left` in one row.
    VARIATOR_DEVICE void load(int64_t m, int64_t last) {
        const int i = thread / 16;
        const Row at = row(m + i, last);
        const int64_t column = first_right + thread % 16 * 8;
        const bool inside = at.token >= 0 && column < p.d;
        float v[8] = {};
        if (inside) {
            const int64_t index = p.right_by_group ? at.group : at.token;
            Vec16 x = load16(element(p.right, index * p.right_stride + column));
            if (p.moments != nullptr) {
                const float* moments = p.moments + (at.group * p.groups.k + at.slot) * 2;
                float weight[8], bias[8];
                load8<T>(p.norm.weight, column, 1, weight);
                load8<T>(p.norm.bias, column, 0, bias);
                x = normed<T>(x, moments[0], moments[1], weight, bias);
            }
            widen<T>(x, v);
        }
        store4(&shared.right[i][thread % 16 * 8], v);
        store4(&shared.right[i][thread % 16 * 8 + 4], v + 4);
        float left[4] = {};
        if (at.token >= 0) {
            const int64_t index = p.left_by_group ? at.group : at.token;
            for (int b = 0; b < 4; ++b) {
                const int64_t c = first_left + thread % 16 * 4 + b;
                if (c < p.left_columns)
                    left[b] = c < p.left_stride ? p.left[index * p.left_stride + c] : 1.0f;
            }
        }
        store4(&shared.left[i][thread % 16 * 4], left);
    }
};

// Grid: column tiles of `right`, column tiles of `left`, parts.
template <class T>
VARIATOR_KERNEL(threads, 2)
weight_gradient_kernel(const WeightGradientParams p) {
    WeightGradientTile<T>{p, *reinterpret_cast<WeightGradientShared*>(shared_memory()),
                          block_x() * gradient_tile_n, block_y() * gradient_tile_m, block_z()}
        .run();
}

}  // namespace variator::cuda
