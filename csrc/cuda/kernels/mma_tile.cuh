// The tile that all of our kernels work on, and mma.sync on it. A thread block of 8 warps takes 8
// groups, and a quad of 4 slots of each at a time, so 32 rows. Columns are cut into blocks of 32,
// which are divided among the warps.
//
// A lane is (row, part): it holds 8 adjacent elements, 16 bytes, of row `row` in a block's part
// `part`. These 16 bytes are the tensor cores' operands as they are: the order of the terms along
// the inner dimension is free as long as both operands use the same one, so step `step` multiplies
// columns 8·part + 4·step .. + 3 of the block. Nothing is packed or staged through shared memory.
//   left operand [16, 32]: rows `low` (0-7) and `high` (8-15); right operand [8, 32]: one row per
//   lane; result [16, 8]: a lane has columns 2·part, 2·part + 1 of rows `row` and `row` + 8.
#pragma once

#include "device.cuh"

namespace variator::cuda {

constexpr int warps = 8, threads = 32 * warps;
constexpr int tile_groups = 8, quad = 4, tile_rows = tile_groups * quad;
constexpr int block_columns = 32;
constexpr int partial_floats = warps * tile_rows * 36;  // shared memory of add_warps

struct Lane {
    int warp, row, part;
    static VARIATOR_DEVICE Lane here() {
        const int thread = thread_index();
        return {thread / 32, thread % 32 / 4, thread % 4};
    }
    // This lane's first column in a block of columns.
    VARIATOR_DEVICE int column(int block) const { return block * block_columns + 8 * part; }
};

template <class E = void>
VARIATOR_DEVICE const E* element(const void* base, int64_t index) {
    return reinterpret_cast<const E*>(static_cast<const char*>(base) + 2 * index);
}
VARIATOR_DEVICE void* element(void* base, int64_t index) {
    return static_cast<char*>(base) + 2 * index;
}

VARIATOR_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The column blocks first .. last-1 that belong to one warp.
struct BlockRange {
    int first, last;
    static VARIATOR_DEVICE BlockRange of_warp(int warp, int begin, int end) {
        const int each = (end - begin + warps - 1) / warps;
        const int first = begin + warp * each;
        return {first, first + each < end ? first + each : end};
    }
};

VARIATOR_DEVICE Vec16 zero16() { return {{0, 0, 0, 0}}; }
VARIATOR_DEVICE Vec16 load16_if(bool holds, const void* p) { return holds ? load16(p) : zero16(); }

template <class T>
VARIATOR_DEVICE Vec16 ones16() {
    const uint32_t ones = T::pack(1.0f, 1.0f);
    return {{ones, ones, ones, ones}};
}

template <class T>
VARIATOR_DEVICE void widen(const Vec16& v, float (&x)[8]) {
    VARIATOR_UNROLL
    for (int i = 0; i < 4; ++i) T::unpack(v.word[i], x[2 * i], x[2 * i + 1]);
}
template <class T>
VARIATOR_DEVICE Vec16 narrow(const float (&x)[8]) {
    Vec16 v;
    VARIATOR_UNROLL
    for (int i = 0; i < 4; ++i) v.word[i] = T::pack(x[2 * i], x[2 * i + 1]);
    return v;
}
// Eight elements of a vector; `missing` in place of each if there is no vector.
template <class T>
VARIATOR_DEVICE void load8(const Vector& v, int64_t at, float missing, float (&x)[8]) {
    if (v.data == nullptr) {
        VARIATOR_UNROLL
        for (int i = 0; i < 8; ++i) x[i] = missing;
    } else if (v.wide) {
        load4(static_cast<const float*>(v.data) + at, x);
        load4(static_cast<const float*>(v.data) + at + 4, x + 4);
    } else {
        widen<T>(load16(element(v.data, at)), x);
    }
}
template <class T>
VARIATOR_DEVICE float load1(const Vector& v, int64_t at) {
    return v.wide ? static_cast<const float*>(v.data)[at]
                  : T::widen(static_cast<const typename T::Element*>(v.data)[at]);
}

// Rows `low` and `high` in the order of the left operand. Rows that are multiplied more than once
// are kept so: their words change places once.
struct Pair {
    uint32_t step[2][4];

    static VARIATOR_DEVICE Pair of(const Vec16& low, const Vec16& high) {
        Pair pair;
        VARIATOR_UNROLL
        for (int i = 0; i < 4; ++i) pair.word(0, i) = low.word[i], pair.word(1, i) = high.word[i];
        return pair;
    }
    VARIATOR_DEVICE uint32_t& word(int row, int i) { return step[i / 2][i % 2 * 2 + row]; }
    VARIATOR_DEVICE Vec16 row(int row) const {
        Vec16 v;
        VARIATOR_UNROLL
        for (int i = 0; i < 4; ++i) v.word[i] = step[i / 2][i % 2 * 2 + row];
        return v;
    }
};

// c += left · rightᵀ over the 32 columns of a block.
template <class T>
VARIATOR_DEVICE void multiply(float (&c)[4], const Pair& left, const Vec16& right) {
    VARIATOR_UNROLL
    for (int step = 0; step < 2; ++step) {
        const uint32_t b[2] = {right.word[2 * step], right.word[2 * step + 1]};
        T::mma(c, left.step[step], b);
    }
}
template <class T>
VARIATOR_DEVICE void multiply(float (&c)[4], const Vec16& low, const Vec16& high,
                              const Vec16& right) {
    multiply<T>(c, Pair::of(low, high), right);
}

// Which row of the right operand this lane loads for tile `tile` of 4. The rows are permuted such
// that a lane's results over all tiles are 8 adjacent columns, starting at 8·part: c[tile][i] is
// column 2·tile + i of them.
VARIATOR_DEVICE int spread(int tile, int row) { return 8 * (row / 2) + 2 * tile + row % 2; }

// Partial results [32 rows, 32 columns] of each warp in shared memory, to be added up.
constexpr int partial_stride = 36;  // so that a quarter of a warp stores without bank conflicts

// A warp's results of tiles `tile` and tile + 1, by pair of slots, with the columns in `spread`
// order.
VARIATOR_DEVICE void put_partial(const Lane& at, int tile, const float (&even)[2][4],
                                 const float (&odd)[2][4], float* partial) {
    float* to = partial + at.warp * tile_rows * partial_stride + 8 * at.part + 2 * tile;
    VARIATOR_UNROLL
    for (int slot = 0; slot < quad; ++slot) {
        const int pair = slot / 2, i = slot % 2 * 2;
        const float four[4] = {even[pair][i], even[pair][i + 1], odd[pair][i], odd[pair][i + 1]};
        store4(to + (slot * tile_groups + at.row) * partial_stride, four);
    }
}

// Calls store(row, column, sums of 4 adjacent columns) of what all warps have put. Called by all
// threads.
template <class Store>
VARIATOR_DEVICE void add_warps(const float* partial, Store store) {
    block_sync();
    const int row = thread_index() / 8, column = thread_index() % 8 * 4;
    float sum[4] = {};
    VARIATOR_UNROLL
    for (int warp = 0; warp < warps; ++warp) {
        float part[4];
        load4(partial + (warp * tile_rows + row) * partial_stride + column, part);
        VARIATOR_UNROLL
        for (int i = 0; i < 4; ++i) sum[i] += part[i];
    }
    store(row, column, sum);
    block_sync();
}

// The sum over the four parts of a row; every lane of the row gets it.
VARIATOR_DEVICE float row_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// Stores 4 values to row [columns] from `column` on, a multiple of 4, but not past its end. Rows
// lie behind one another.
VARIATOR_DEVICE void store_up_to(float* row, int column, int columns, const float (&values)[4]) {
    if (columns % 4 == 0) {
        if (column < columns) store4(row + column, values);
        return;
    }
    VARIATOR_UNROLL
    for (int i = 0; i < 4; ++i)
        if (column + i < columns) row[column + i] = values[i];
}

}  // namespace variator::cuda
