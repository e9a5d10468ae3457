#include "sublayer.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "group_lists.h"
#include "scratch.h"

namespace variator {
namespace {

// Vectors that pass the products together: what lies between them stays in cache.
constexpr int64_t most_rows = 2048;

int64_t bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Arrays in one allocation. Not thread_scratch's, which the kernels use.
class Scratch {
  public:
    int64_t reserve(int64_t bytes) {
        const int64_t at = bytes_;
        bytes_ += (bytes + 63) / 64 * 64;
        return at;
    }
    void take() { memory_.reset(static_cast<char*>(allocate(static_cast<size_t>(bytes_)))); }
    char* at(int64_t offset) const { return memory_.get() + offset; }

  private:
    struct Release {
        void operator()(char* memory) const { release(memory); }
    };
    int64_t bytes_ = 0;
    std::unique_ptr<char, Release> memory_;
};

template <class P>
void describe(P& p, const Linear& linear, const How& how, const Rows& x, const Around& around,
              void* y) {
    p.dtype = how.dtype, p.threads = how.threads;
    p.rows = x.count, p.inner = linear.inner, p.columns = linear.columns;
    p.x = x.data, p.x_stride = x.stride;
    p.bias = linear.bias, p.activation = around.activation;
    p.norm = around.norm.kind, p.eps = around.norm.eps;
    p.norm_weight = static_cast<const float*>(around.norm.weight);
    p.norm_bias = static_cast<const float*>(around.norm.bias);
    p.other = around.other, p.residual = around.residual, p.y = y;
}

// norm(x), [x.count, d].
void norm_rows(const Kernels* kernels, const How& how, const NormParams& norm, const Rows& x,
               int64_t d, void* y) {
    NormRowsParams p{};
    p.dtype = how.dtype, p.threads = how.threads, p.rows = x.count, p.d = d;
    p.x = x.data, p.x_stride = x.stride;
    p.norm = norm.kind, p.norm_weight = norm.weight, p.norm_bias = norm.bias;
    p.eps = norm.eps, p.y = y;
    kernels->norm_rows(p);
}

// A norm behind a sublayer, in place.
void norm_behind(const Kernels* kernels, const How& how, const NormParams& norm, int64_t rows,
                 int64_t d, void* y) {
    if (norm.kind != Norm::none) norm_rows(kernels, how, norm, {rows, y, d}, d, y);
}

}  // namespace

void multiply(const Linear& linear, const How& how, const Rows& x, const Around& around, void* y) {
    if (linear.scales == nullptr) {
        RowsLinearParams p{};
        describe(p, linear, how, x, around, y);
        p.packed = linear.packed;
        return linear.kernels->rows_linear(p);
    }
    if (how.dtype == DType::float64)
        throw std::invalid_argument(
            "dtype must be float32, bfloat16 or float16 in int8 products, got float64");
    Int8LinearParams p{};
    describe(p, linear, how, x, around, y);
    p.packed = static_cast<const int8_t*>(linear.packed);
    p.sums = linear.sums, p.scales = linear.scales;
    linear.kernels->int8_linear(p);
}

void FfnProducts::run(const How& how, const Rows& x, const NormParams& norm, const void* residual,
                      void* inner, void* y) const {
    multiply(in, how, x, {activation, norm, nullptr, nullptr}, inner);
    // Each number of `inner` is read where its product is written, right before.
    if (gate) multiply(*gate, how, x, {Activation::none, norm, inner, nullptr}, inner);
    const Rows made{x.count, inner, in.columns};
    multiply(out, how, made, {Activation::none, {}, nullptr, residual}, y);
}

void DenseFfn::run(const Rows& x, void* y, int threads) const {
    const How how{dtype, threads};
    const int64_t size = bytes_of(dtype), d = products.in.inner, f = products.in.columns;
    const int64_t most = std::min(most_rows, x.count);
    // In floating point two products would each apply the norm.
    const bool first = products.gate && !products.in.scales && norm.kind != Norm::none;
    Scratch scratch;
    const int64_t normed_at = scratch.reserve(first ? most * d * size : 0),
                  inner_at = scratch.reserve(most * f * size);
    scratch.take();
    for (int64_t at = 0; at < x.count; at += most) {
        const char* data = static_cast<const char*>(x.data) + at * x.stride * size;
        Rows rows{std::min(most, x.count - at), data, x.stride};
        if (first) {
            norm_rows(kernels, how, norm, rows, d, scratch.at(normed_at));
            rows = {rows.count, scratch.at(normed_at), d};
        }
        char* made = static_cast<char*>(y) + at * d * size;
        products.run(how, rows, first ? NormParams{} : norm, residual ? data : nullptr,
                     scratch.at(inner_at), made);
        norm_behind(kernels, how, behind, rows.count, d, made);
    }
}

void CompressedFfn::run(const Rows& x, const Groups& groups, bool outside, void* y,
                        int threads) const {
    const How how{merge.dtype, threads};
    const int64_t size = bytes_of(merge.dtype), d = merge.d;
    if (groups.count == 0) {
        if (residual && outside) copy_outside(groups, x.count, x.data, x.stride, y, d, size);
        return;
    }
    const int64_t most = std::min(most_rows, groups.count), acc = sizeof(float);
    Scratch scratch;
    const int64_t projected_at = scratch.reserve(x.count * merge.r * acc),
                  merged_at = scratch.reserve(most * d * size),
                  inner_at = scratch.reserve(most * products.in.columns * size),
                  poison_at = scratch.reserve(most * acc);
    scratch.take();
    MergeParams m = merge;
    m.threads = threads, m.x = x.data, m.x_stride = x.stride;
    m.merged = scratch.at(merged_at), m.projected = scratch.at(projected_at);
    m.poison = scratch.at(poison_at);
    DecompressParams out = decompress;
    out.threads = threads, out.projected = m.projected, out.poison = m.poison;
    out.residual = residual ? x.data : nullptr, out.residual_stride = residual ? x.stride : 0;
    out.u = m.merged, out.y = y;
    for (int64_t at = 0; at < groups.count; at += most) {
        m.groups = out.groups = part(groups, at, std::min(most, groups.count - at));
        kernels->merge(m);
        products.run(how, {m.groups.count, m.merged, d}, {}, nullptr, scratch.at(inner_at),
                     m.merged);
        kernels->decompress(out);
    }
    norm_behind(kernels, how, behind, x.count, d, y);
    // Last: the norm went over all rows.
    if (residual && outside) copy_outside(groups, x.count, x.data, x.stride, y, d, size);
}

void AttentionSublayer::run(const Rows& x, AttentionParams p, const Groups& groups, bool outside,
                            void* y, int threads) const {
    const How how{attention.dtype, threads};
    const int64_t size = bytes_of(how.dtype), merged = keys_values ? p.rows * p.keys : 0;
    p.dtype = how.dtype, p.path = attention.path, p.threads = threads, p.scale = attention.scale;
    p.heads = attention.heads, p.kv_heads = attention.kv_heads, p.d = attention.d;
    const int64_t queries = p.heads * p.d, keys = p.kv_heads * p.d;
    Scratch scratch;
    const int64_t in_at = scratch.reserve(x.count * in.columns * size),
                  merged_at = scratch.reserve(merged * in.inner * size),
                  keys_at = scratch.reserve(merged * 2 * keys * size),
                  out_at = scratch.reserve(x.count * queries * size);
    scratch.take();
    multiply(in, how, x, {Activation::none, norm, nullptr, nullptr}, scratch.at(in_at));
    const char* k = scratch.at(in_at) + queries * size;
    int64_t stride = in.columns;
    if (keys_values) {
        MergeParams m = merge;
        m.threads = threads, m.groups = groups, m.x = x.data, m.x_stride = x.stride;
        m.merged = scratch.at(merged_at);
        kernels->merge(m);
        multiply(*keys_values, how, {merged, m.merged, in.inner}, {}, scratch.at(keys_at));
        k = scratch.at(keys_at), stride = 2 * keys;
    }
    p.q = {scratch.at(in_at), p.queries * in.columns, in.columns, p.d};
    p.k = {k, p.keys * stride, stride, p.d};
    p.v = {k + keys * size, p.keys * stride, stride, p.d};
    p.out = scratch.at(out_at);
    kernels->attention(p);
    multiply(out, how, {x.count, p.out, queries},
             {Activation::none, {}, nullptr, residual ? x.data : nullptr}, y);
    norm_behind(kernels, how, behind, x.count, out.columns, y);
    if (residual && outside) copy_outside(groups, x.count, x.data, x.stride, y, out.columns, size);
}

}  // namespace variator
