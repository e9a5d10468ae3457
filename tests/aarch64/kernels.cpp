// Runs every portable CPU kernel on numbers that are the same on every machine, and writes what
// comes out: a line "case output count", then so many doubles.
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/group_lists.h"

using namespace variator;

namespace {

constexpr int64_t rows = 2, n = 37, d = 50, r = 9, tokens = rows * n;

// Multiples of 1/64 below 1: exact in every storage type, so that all have the same inputs.
uint32_t state;
double number() {
    state = state * 1664525u + 1013904223u;
    return (static_cast<int>(state >> 25) - 64) / 64.0;
}

uint16_t half_of(DType dtype, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (dtype == DType::bfloat16) return static_cast<uint16_t>(bits >> 16);
    if (x == 0) return 0;
    return static_cast<uint16_t>((bits >> 16 & 0x8000) + ((bits >> 23 & 255) - 112) * 1024 +
                                 (bits >> 13 & 1023));
}

double value_of(DType dtype, uint16_t half) {
    if (dtype == DType::bfloat16) {
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
    const int exponent = half >> 10 & 31;
    const double mantissa = (half & 1023) + (exponent ? 1024 : 0);
    const int shift = (exponent ? exponent : 1) - 25;
    const double x = shift < 0 ? mantissa / (int64_t{1} << -shift) : mantissa * (1 << shift);
    return half & 0x8000 ? -x : x;
}

// Numbers in memory as a kernel wants them. 64 bytes behind them show writes beyond the end.
struct Array {
    DType dtype;
    int64_t count, size;
    std::vector<unsigned char> bytes;

    Array(DType type, int64_t elements)
        : dtype(type),
          count(elements),
          size(type == DType::float64   ? 8
               : type == DType::float32 ? 4
                                        : 2),
          bytes(static_cast<size_t>(elements * size) + 64, 0) {}
    static Array random(DType type, int64_t elements, double scale = 1) {
        Array a(type, elements);
        for (int64_t i = 0; i < elements; ++i) a.set(i, number() * scale);
        return a;
    }
    void set(int64_t i, double x) {
        const float narrow = static_cast<float>(x);
        const uint16_t half = size == 2 ? half_of(dtype, narrow) : 0;
        const void* from = size == 8 ? static_cast<const void*>(&x) : size == 4 ? &narrow : nullptr;
        memcpy(data() + i * size, from ? from : &half, static_cast<size_t>(size));
    }
    double get(int64_t i) const {
        double x = 0;
        float narrow = 0;
        uint16_t half = 0;
        const unsigned char* at = bytes.data() + i * size;
        if (size == 8) memcpy(&x, at, 8);
        if (size == 4) memcpy(&narrow, at, 4), x = narrow;
        if (size == 2) memcpy(&half, at, 2), x = value_of(dtype, half);
        return x;
    }
    unsigned char* data() { return bytes.data(); }
};

std::string title;

void write(const char* output, const Array& a) {
    printf("%s %s %lld\n", title.c_str(), output, static_cast<long long>(a.count));
    for (int64_t i = 0; i < a.count; ++i) {
        const double x = a.get(i);
        fwrite(&x, 8, 1, stdout);
    }
    for (size_t i = a.bytes.size() - 64; i < a.bytes.size(); ++i)
        if (a.bytes[i] != 0) fprintf(stderr, "%s %s: written beyond\n", title.c_str(), output);
}

void run(DType dtype, int64_t k, Norm norm, bool holes) {
    state = 1;
    const DType wide = dtype == DType::float64 ? dtype : DType::float32;
    const Kernels& kernels = find_kernels("portable", dtype);
    auto pack = [&](Array& source, int64_t matrices, int64_t matrix_stride, int64_t inner,
                    int64_t inner_stride, int64_t columns, int64_t column_stride) {
        PackParams p{wide,         false,   matrices,      matrix_stride, inner,
                     inner_stride, columns, column_stride, source.data(), nullptr};
        std::unique_ptr<unsigned char[]> packed(new unsigned char[kernels.packed_bytes(p)]);
        p.packed = packed.get();
        kernels.pack(p);
        return packed;
    };

    std::vector<uint8_t> mask(tokens, 1);
    for (int64_t i = 0; holes && i < tokens; ++i) mask[i] = number() > -0.5;
    const int64_t count = rows * ((n + k - 1) / k);
    std::vector<int64_t> start(count), span(count);
    list_groups(mask.data(), rows, n, k, start.data(), span.data());
    const Groups groups{start.data(), span.data(), mask.data(), nullptr, count, k};

    Array x = Array::random(dtype, tokens * d), dy = Array::random(dtype, tokens * d);
    Array norm_weight = Array::random(wide, d), norm_bias = Array::random(wide, d);
    Array wc = Array::random(wide, k * k * d, 0.25), bc = Array::random(wide, k);
    Array w1h = Array::random(wide, r * d, 0.25), w1u = Array::random(wide, r * d, 0.25);
    Array b1 = Array::random(wide, r), w2 = Array::random(wide, d * r, 0.25);
    Array b2 = Array::random(wide, d), d_projected = Array::random(wide, tokens * r);
    auto wc_packed = pack(wc, k, d, d, 1, k, k * d), w1h_packed = pack(w1h, 1, 0, d, 1, r, d);
    auto wc_rows = pack(wc, k, d, k, k * d, d, 1), w1h_rows = pack(w1h, 1, 0, r, d, d, 1);
    auto w1u_packed = pack(w1u, 1, 0, d, 1, r, d), w1u_rows = pack(w1u, 1, 0, r, d, d, 1);
    auto w2_packed = pack(w2, 1, 0, r, 1, d, r), w2_rows = pack(w2, 1, 0, d, r, r, 1);

    Array merged(dtype, count * d), projected(wide, tokens * r), softmax(wide, count * k);
    Array poison(wide, count);
    MergeParams m{};
    m.dtype = dtype, m.threads = 2, m.groups = groups, m.d = d, m.r = r;
    m.x = x.data(), m.x_stride = d;
    m.norm = norm, m.eps = 1e-6;
    if (norm != Norm::none) m.norm_weight = norm_weight.data();
    if (norm == Norm::layer) m.norm_bias = norm_bias.data();
    m.merge_weight = k <= direct_scores ? static_cast<void*>(wc.data()) : wc_packed.get();
    m.merge_bias = bc.data(), m.projection_packed = w1h_packed.get();
    m.merged = merged.data(), m.projected = projected.data();
    m.softmax = softmax.data(), m.poison = poison.data();
    kernels.merge(m);
    write("merged", merged), write("projected", projected), write("softmax", softmax);

    Array y(dtype, tokens * d);
    DecompressParams c{};
    c.dtype = dtype, c.threads = 2, c.groups = groups, c.d = d, c.r = r, c.phi = Phi::tanh;
    c.u = merged.data(), c.projected = projected.data(), c.w1u_packed = w1u_packed.get();
    c.b1 = b1.data(), c.w2_packed = w2_packed.get(), c.b2 = b2.data(), c.poison = poison.data();
    c.residual = x.data(), c.residual_stride = d, c.y = y.data();
    kernels.decompress(c);
    write("y", y);

    Array du(dtype, count * d), d_hidden(wide, tokens * r), d_w1u(wide, r * d), d_b1(wide, r);
    Array d_w2(wide, r * d), d_b2(wide, d);
    DecompressBackwardParams cb{};
    cb.dtype = dtype, cb.threads = 2, cb.groups = groups, cb.d = d, cb.r = r, cb.phi = Phi::tanh;
    cb.u = merged.data(), cb.projected = projected.data(), cb.w1u_packed = w1u_packed.get();
    cb.b1 = b1.data(), cb.w2_packed_rows = w2_rows.get(), cb.w1u_packed_rows = w1u_rows.get();
    cb.dy = dy.data(), cb.dy_stride = d, cb.du = du.data(), cb.d_projected = d_hidden.data();
    cb.d_w1u = d_w1u.data(), cb.d_b1 = d_b1.data(), cb.d_w2 = d_w2.data(), cb.d_b2 = d_b2.data();
    kernels.decompress_backward(cb);
    write("du", du), write("d_hidden", d_hidden), write("d_w1u", d_w1u), write("d_b1", d_b1);
    write("d_w2", d_w2), write("d_b2", d_b2);

    Array dx(dtype, tokens * d), d_wc(wide, k * k * d), d_bc(wide, k), d_w1h(wide, r * d);
    Array d_norm_weight(wide, d), d_norm_bias(wide, d);
    MergeBackwardParams mb{};
    mb.dtype = dtype, mb.threads = 2, mb.groups = groups, mb.d = d, mb.r = r;
    mb.x = x.data(), mb.x_stride = d, mb.norm = norm, mb.eps = m.eps;
    mb.norm_weight = m.norm_weight, mb.norm_bias = m.norm_bias;
    mb.softmax = softmax.data(), mb.merge_packed_rows = wc_rows.get();
    mb.projection_packed_rows = w1h_rows.get();
    mb.d_merged = merged.data(), mb.d_projected = d_projected.data(), mb.dx = dx.data();
    mb.d_merge_weight = d_wc.data(), mb.d_merge_bias = d_bc.data(), mb.d_projection = d_w1h.data();
    if (m.norm_weight != nullptr) mb.d_norm_weight = d_norm_weight.data();
    if (m.norm_bias != nullptr) mb.d_norm_bias = d_norm_bias.data();
    kernels.merge_backward(mb);
    write("dx", dx), write("d_wc", d_wc), write("d_bc", d_bc), write("d_w1h", d_w1h);
    write("d_norm_weight", d_norm_weight), write("d_norm_bias", d_norm_bias);
}

}  // namespace

int main() {
    const char* dtypes[] = {"float32", "bfloat16", "float16", "float64"};
    const char* norms[] = {"none", "rms", "layer"};
    for (int dtype = 0; dtype < 4; ++dtype)
        for (int norm = 0; norm < 3; ++norm)
            for (int64_t k : {2, 5, 16})
                for (bool holes : {false, true}) {
                    title = std::string(dtypes[dtype]) + " " + norms[norm] +
                            " k=" + std::to_string(k) + (holes ? " holes" : " whole");
                    run(static_cast<DType>(dtype), k, static_cast<Norm>(norm), holes);
                }
}
