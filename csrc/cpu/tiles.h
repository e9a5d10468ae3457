// Products in AMX's tiles: 16 rows of 64 bytes each, whose rows hold 16 words of a quad of int8, a
// pair of bf16, or one sum.
#pragma once

#include "operands.h"

namespace variator {
namespace VARIATOR_ISA {

constexpr int64_t tile_block_rows = 32;  // of two tiles

#ifdef VARIATOR_TILES

// GCC's intrinsics say nothing of the memory that they read, so the compiler may move or drop what
// was written there; and they configure tiles with the first eight bytes.
template <int tile>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
// 16 rows of 64 bytes, `stride` bytes apart.
template <int tile>
inline void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}

struct TileShapes {
    uint8_t palette = 1, start = 0, zero[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);

// Tiles of this thread in our shapes; afterwards in those that oneDNN, or whoever else, had set.
class TileSession {
  public:
    TileSession() {
        asm volatile("sttilecfg %0" : "=m"(before_));
        const TileShapes ours;
        asm volatile("ldtilecfg %0" ::"m"(ours));
    }
    ~TileSession() {
        if (before_.palette)
            asm volatile("ldtilecfg %0" ::"m"(before_));
        else
            asm volatile("tilerelease");
    }
    TileSession(const TileSession&) = delete;
    TileSession& operator=(const TileSession&) = delete;

  private:
    TileShapes before_;
};

// Products of bf16 pairs with fp32 sums, panels as for Pairs.
struct TilePairs {
    using Session = TileSession;
    using Element = uint16_t;
    using Packed = uint16_t;
    using Sum = float;
    static constexpr bool tiles = true;
    static constexpr int step = 32;
};
// Products of uint8 and int8 with int32 sums.
struct TileQuads {
    using Session = TileSession;
    using Element = uint8_t;
    using Packed = int8_t;
    using Sum = int32_t;
    static constexpr bool tiles = true;
    static constexpr int step = 64;
};

// sum += a · b: a [16][P::step], b [P::step][16].
template <class P, int sum, int a, int b>
inline void tile_multiply() {
    if constexpr (std::is_same_v<P, TilePairs>)
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
    else
        asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

// c [16 · rows][16 · columns] = a · b; bytes from one row, of b one of words, to the next.
// meanwhile() runs at each step and may use what tiles leave idle: everything else.
template <class P, int rows, int columns, class Meanwhile>
inline __attribute__((always_inline)) void tile_block(const char* a, int64_t stride, const char* b,
                                                      int64_t ldb, int64_t steps, char* c,
                                                      int64_t ldc, Meanwhile& meanwhile) {
    const char* below = a + 16 * stride;
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t k = 0; k < steps; ++k, a += 64, below += 64, b += 16 * ldb) {
        tile_load<4>(a, stride);
        if constexpr (rows > 1) tile_load<5>(below, stride);
        tile_load<6>(b, ldb);
        tile_multiply<P, 0, 4, 6>();
        if constexpr (rows > 1) tile_multiply<P, 2, 5, 6>();
        if constexpr (columns > 1) {
            tile_load<7>(b + 64, ldb);
            tile_multiply<P, 1, 4, 7>();
            if constexpr (rows > 1) tile_multiply<P, 3, 5, 7>();
        }
        meanwhile();
    }
    tile_store<0>(c, ldc);
    if constexpr (columns > 1) tile_store<1>(c + 64, ldc);
    if constexpr (rows > 1) tile_store<2>(c + 16 * ldc, ldc);
    if constexpr (rows > 1 && columns > 1) tile_store<3>(c + 16 * ldc + 64, ldc);
}

// Up to tile_block_rows rows of a with one panel of `vectors` times 16 columns: sums [rows][16 ·
// vectors].
template <class P, int vectors, class Meanwhile>
void tile_panel(const typename P::Element* a, int64_t stride, int64_t rows, int64_t inner,
                const typename P::Packed* b, typename P::Sum* sums, Meanwhile& meanwhile) {
    constexpr int64_t ld = 64 * vectors;
    const char* left = reinterpret_cast<const char*>(a);
    const char* top = reinterpret_cast<const char*>(b);
    char* out = reinterpret_cast<char*>(sums);
    const int64_t bytes = stride * int64_t{sizeof *a}, steps = inner / P::step;
#pragma GCC unroll 2
    for (int n = 0; n < vectors; n += 2) {
        constexpr int last = vectors % 2;
        const auto block = [&](auto many) {
            if (rows > 16)
                tile_block<P, 2, decltype(many)::value>(left, bytes, top + 64 * n, ld, steps,
                                                        out + 64 * n, ld, meanwhile);
            else
                tile_block<P, 1, decltype(many)::value>(left, bytes, top + 64 * n, ld, steps,
                                                        out + 64 * n, ld, meanwhile);
        };
        if (last && n + 1 == vectors)
            block(std::integral_constant<int, 1>{});
        else
            block(std::integral_constant<int, 2>{});
    }
}

// As panel_rows in gemm.h. Rows beyond `rows`, to a multiple of 16, are read.
template <class P, class V, int vectors, class Sink, class Meanwhile>
void tile_rows(const Strided<typename P::Element>& a, int64_t rows, int64_t first, int64_t inner,
               const typename P::Packed* b, Sink& sink, Meanwhile& meanwhile) {
    alignas(64) typename P::Sum sums[tile_block_rows * 16 * vectors];
    for (int64_t m = 0; m < rows; m += tile_block_rows) {
        meanwhile();
        const int64_t many = smaller(tile_block_rows, rows - m);
        Nothing nothing;
        tile_panel<P, vectors>(a.row(m) + first, a.row_stride, many, inner, b, sums, nothing);
        for (int64_t i = 0; i < many; ++i) {
            const auto put = sink(m + i);
#pragma GCC unroll 4
            for (int n = 0; n < vectors; ++n)
                put(int64_t{n} * V::width, V::load(sums + (i * vectors + n) * V::width));
        }
    }
}

#endif

// Rows of a product worked on at once, and rows of A that it reads: in tiles, those that follow
// too.
template <class P, class V>
constexpr int64_t tile_height() {
    return P::tiles ? tile_block_rows : V::tile_rows;
}
template <class P>
constexpr int64_t read_rows(int64_t rows) {
    return P::tiles ? round_up(rows, 16) : rows;
}

// Elements from one row of an operand in scratch to the next. Rows of a tile are an odd number of
// lines apart: an even one would let them want the same parts of the first-level cache.
template <class P>
int64_t apart(int64_t inner) {
    if (!P::tiles) return inner;
    constexpr int64_t line = 64 / sizeof(typename P::Element);
    return (round_up(inner, line) / line | 1) * line;
}

#ifndef VARIATOR_TILES
template <class P, class V, int vectors, class... Arguments>
void tile_rows(const Arguments&...);  // nobody has tiles
#endif

#ifdef VARIATOR_TILES
using BestPairs = TilePairs;
#elif defined(VARIATOR_BF16_PRODUCTS)
using BestPairs = Pairs;
#endif

}  // namespace VARIATOR_ISA
}  // namespace variator
