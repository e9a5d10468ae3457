// The products of attention in AMX's tiles.
#pragma once

#include "attention_parts.h"
#include "tiles.h"

namespace variator {
namespace VARIATOR_ISA {

#ifdef VARIATOR_TILES

// An operand of tiles: bytes from one row (of pairs), inner step of a tile, or part to the next.
struct TileOperand {
    const char* data;
    int64_t row, step, part;
    TileOperand(const uint16_t* elements, int64_t row, int64_t step, int64_t part)
        : data(reinterpret_cast<const char*>(elements)),
          row(2 * row),
          step(2 * step),
          part(2 * part) {}
};

// c [16 · rows][16 · columns] [+]= a · b. The product of two second parts is left out: less than
// fp16 rounds.
template <int parts, int rows, int columns>
void tile_product(const TileOperand a, const TileOperand b, int64_t steps, float* c, int64_t ldc,
                  bool add) {
    static_assert(rows <= 2 && columns <= 2);
    const int64_t stride = 4 * ldc;
    float *c10 = c + 16 * ldc, *c01 = c + 16, *c11 = c10 + 16;
    if (add) {
        tile_load<0>(c, stride);
        if constexpr (columns > 1) tile_load<1>(c01, stride);
        if constexpr (rows > 1) tile_load<2>(c10, stride);
        if constexpr (rows > 1 && columns > 1) tile_load<3>(c11, stride);
    } else {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    }
    const char *left = a.data, *below = a.data + 16 * a.row, *top = b.data;
    for (int64_t k = 0; k < steps; ++k, left += a.step, below += a.step, top += b.step) {
#pragma GCC unroll 2
        for (int i = 0; i < parts; ++i) {
            tile_load<4>(left + i * a.part, a.row);
            if constexpr (rows > 1) tile_load<5>(below + i * a.part, a.row);
#pragma GCC unroll 2
            for (int j = 0; j < parts - i; ++j) {
                tile_load<6>(top + j * b.part, b.row);
                if constexpr (columns > 1) tile_load<7>(top + j * b.part + 64, b.row);
                tile_multiply<TilePairs, 0, 4, 6>();
                if constexpr (columns > 1) tile_multiply<TilePairs, 1, 4, 7>();
                if constexpr (rows > 1) tile_multiply<TilePairs, 2, 5, 6>();
                if constexpr (rows > 1 && columns > 1) tile_multiply<TilePairs, 3, 5, 7>();
            }
        }
    }
    tile_store<0>(c, stride);
    if constexpr (columns > 1) tile_store<1>(c01, stride);
    if constexpr (rows > 1) tile_store<2>(c10, stride);
    if constexpr (rows > 1 && columns > 1) tile_store<3>(c11, stride);
}

template <class V, DType dtype, int parts>
struct TileProducts : PartProducts<V, dtype, parts, 32, 256> {
    using Base = PartProducts<V, dtype, parts, 32, 256>;
    using Session = TileSession;
    static constexpr int64_t block = Base::block, tile = Base::tile, step = 32;

    // One row of tiles where the queries fill no more.
    template <int columns>
    static void multiply(int64_t count, const TileOperand& a, const TileOperand& b, int64_t steps,
                         float* c, int64_t ldc, bool add) {
        if (count > 16)
            tile_product<parts, 2, columns>(a, b, steps, c, ldc, add);
        else
            tile_product<parts, 1, columns>(a, b, steps, c, ldc, add);
    }
    void scores(int64_t at, int64_t count, int64_t first, int64_t columns, float* scores) const {
        const int64_t inner = this->inner, padded = this->padded;
        const TileOperand a{this->queries + at * parts * block * inner, inner, 32, block * inner};
        for (int64_t c = 0; c < columns; c += 32) {
            const int64_t key = first + c, panel = key / panel_columns<V>() * panel_columns<V>();
            const int64_t pairs = 2 * smaller(panel_columns<V>(), padded - panel);
            const TileOperand b{this->keys + panel * inner + 2 * (key - panel), pairs, 16 * pairs,
                                padded * inner};
            multiply<2>(count, a, b, inner / 32, scores + c, tile, false);
        }
    }
    void weighted(const uint16_t* weights, int64_t count, int64_t first, int64_t columns,
                  float* sums) const {
        const int64_t width = this->width;
        const TileOperand a{weights, tile, 32, block * tile};
        for (int64_t c = 0; c < width; c += 32) {
            const TileOperand b{this->values + first * width + 2 * c, 2 * width, 32 * width,
                                this->padded * width};
            if (width - c > 16)
                multiply<2>(count, a, b, columns / 32, sums + c, width, true);
            else
                multiply<1>(count, a, b, columns / 32, sums + c, width, true);
        }
    }
};

template <class V>
struct Multiply<V, DType::bfloat16> : TileProducts<V, DType::bfloat16, 1> {};
template <class V>
struct Multiply<V, DType::float16> : TileProducts<V, DType::float16, 2> {};

#endif

}  // namespace VARIATOR_ISA
}  // namespace variator
