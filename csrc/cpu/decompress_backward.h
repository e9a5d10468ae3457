// Gradients of adapter_decompress. With z = W_1u u + W_1h h + b_1, t = φ(z), o = u + W_2 t + b_2:
//   dt = W_2ᵀ do,  dz = φ'(z) dt,  dW_2 = Σ do tᵀ,  db_2 = Σ do,  d(W_1h h) = dz,
//   du = Σ_j (do + W_1uᵀ dz),  dW_1u = Σ_i (Σ_j dz) uᵀ,  db_1 = Σ dz.
// Of a kept group du = Σ_j do, and nothing else. t is computed again: r numbers a token, cheaper
// than a trip to memory.
#pragma once

#include "decompress.h"
#include "thread_sums.h"

namespace variator {
namespace VARIATOR_ISA {

template <class V, DType dtype>
struct DecompressBackward {
    using S = typename V::Scalar;
    using T = Storage<V, dtype>;
    using E = typename T::Element;
    using Products = Plain<V>;
    const DecompressBackwardParams& p;
    const int64_t padded = round_up(p.d, V::width);
    const int64_t bottleneck = round_up(p.r, V::width);
    ThreadSums<S> w1u{p.threads, p.r, p.d, padded}, w2{p.threads, p.r, p.d, padded};
    ThreadSums<S> b1{p.threads, 1, p.r, bottleneck}, b2{p.threads, 1, p.d, padded};

    void chunk(int64_t first, int64_t last, int thread) const {
        const int64_t rows = last - first;
        Carver carver;
        const int64_t u_at = carver.reserve<S>(rows * padded),
                      q_at = carver.reserve<S>(rows * bottleneck),
                      dq_at = carver.reserve<S>(rows * bottleneck),
                      du_at = carver.reserve<S>(rows * padded),
                      t_at = carver.reserve<S>(block_tokens * bottleneck),
                      dt_at = carver.reserve<S>(block_tokens * bottleneck),
                      dy_at = carver.reserve<S>(block_tokens * padded),
                      db1_at = carver.reserve<S>(bottleneck), db2_at = carver.reserve<S>(padded);
        char* base = static_cast<char*>(thread_scratch(carver.bytes));
        auto at = [&](int64_t offset) { return reinterpret_cast<S*>(base + offset); };
        S *u = at(u_at), *q = at(q_at), *dq = at(dq_at), *du = at(du_at), *t = at(t_at),
          *dt = at(dt_at), *dy = at(dy_at), *db1 = at(db1_at), *db2 = at(db2_at);
        copy_rows<V, dtype, Acc<V>>(p.u, first, rows, p.d, padded, u);
        group_half<V, Products>({u, padded, 1}, rows, p.d, p.r, p.w1u_packed, p.b1, q, bottleneck);
        zero_row<V>(dq, rows * bottleneck);
        zero_row<V>(du, rows * padded);
        auto restored = [&](const TokenBlock& block) {
            // Sums of a block first: one running sum over all tokens would round too often.
            zero_row<V>(db1, bottleneck);
            zero_row<V>(db2, padded);
            for (int64_t i = 0; i < block.count; ++i) {
                const int64_t token = block.token[i], m = block.group[i] - first;
                bottleneck_row<V, Acc<V>>(static_cast<const S*>(p.projected) + token * p.r,
                                          q + m * bottleneck, p.r, bottleneck, p.phi,
                                          t + i * bottleneck);
                row_of_dy(token, dy + i * padded);
                add_row<V>(du + m * padded, dy + i * padded, padded);
                add_row<V>(db2, dy + i * padded, padded);
            }
            product<Products, V>(Strided{dy, padded, 1}, block.count,
                                 {static_cast<const S*>(p.w2_packed_rows), 0}, bottleneck, dt,
                                 bottleneck, p.d, false);
            product<Products, V>(Strided{t, 1, bottleneck}, p.r, {dy, padded}, padded,
                                 w2.of(thread), padded, block.count, true);
            for (int64_t i = 0; i < block.count; ++i)
                through_phi(block.token[i], t + i * bottleneck, dt + i * bottleneck,
                            dq + (block.group[i] - first) * bottleneck, db1);
            add_row<V>(b1.of(thread), db1, bottleneck);
            add_row<V>(b2.of(thread), db2, padded);
        };
        for_token_blocks(p.groups, first, last, restored, [&](int64_t token, int64_t group) {
            // No block is at work meanwhile: its row of dy is free.
            row_of_dy(token, dy);
            add_row<V>(du + (group - first) * padded, dy, padded);
            zero_row<V>(static_cast<S*>(p.d_projected) + token * p.r, p.r);
        });
        product<Products, V>(Strided{dq, bottleneck, 1}, rows,
                             {static_cast<const S*>(p.w1u_packed_rows), 0}, padded, du, padded, p.r,
                             true);
        product<Products, V>(Strided{dq, 1, bottleneck}, p.r, {u, padded}, padded, w1u.of(thread),
                             padded, rows, true);
        for (int64_t m = 0; m < rows; ++m) {
            E* out = static_cast<E*>(p.du) + (first + m) * p.d;
            for_parts<V>(p.d, [&](Part<V> part) {
                part.template store<T>(out, part.template load<Acc<V>>(du + m * padded));
            });
        }
    }

    void row_of_dy(int64_t token, S* out) const {
        const E* row = static_cast<const E*>(p.dy) + token * p.dy_stride;
        normed_row<V, dtype, Acc<V>>(row, p.d, padded, {0, 1}, nullptr, nullptr, out);
    }

    // dz = φ'(z) dt for one token: stored, and added to its group's dq and to db_1.
    void through_phi(int64_t token, const S* t, const S* dt, S* dq, S* db1) const {
        S* out = static_cast<S*>(p.d_projected) + token * p.r;
        for_parts<V>(p.r, [&](Part<V> part) {
            V dz = part.template load<Acc<V>>(dt);
            if (p.phi == Phi::tanh) {
                V y = part.template load<Acc<V>>(t);
                dz = dz * (V::set(1) - y * y);
            }
            part.template store<Acc<V>>(out, dz);
            part.template store<Acc<V>>(dq, part.template load<Acc<V>>(dq) + dz);
            part.template store<Acc<V>>(db1, part.template load<Acc<V>>(db1) + dz);
        });
    }
};

template <class V, DType dtype>
void decompress_backward(const DecompressBackwardParams& p) {
    DecompressBackward<V, dtype> backward{p};
    for_chunks<V>(p.groups.count, p.threads, [&](int64_t first, int64_t last, int thread) {
        backward.chunk(first, last, thread);
    });
    backward.w1u.store(p.d_w1u);
    backward.w2.store(p.d_w2);
    backward.b1.store(p.d_b1);
    backward.b2.store(p.d_b2);
}

}  // namespace VARIATOR_ISA
}  // namespace variator
