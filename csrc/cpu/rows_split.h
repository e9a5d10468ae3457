// Rows with packed panels: cut into chunks that stay in cache, shared among threads, and
// multiplied.
#pragma once

#include "gemm.h"
#include "group_chunks.h"

namespace variator {
namespace VARIATOR_ISA {

// Rows whose sums with a panel wait together for what follows, and all such sums.
template <class P>
constexpr int64_t rows_of_sums = P::tiles ? tile_block_rows : 96;
template <class P, class V>
constexpr int64_t sums_of_blocks = (P::tiles ? 2 : 1) * rows_of_sums<P> * panel_columns<V>();

// From one panel to before another.
struct PanelRange {
    int64_t first, last;
};

#ifdef VARIATOR_TILES
// Sums of a block that wait: rows from `row` to before `end` are left.
template <class Sum>
struct WaitingSums {
    int64_t row = 0, end = 0, n = 0, columns = 0, width = 0;
    const Sum* sums = nullptr;

    template <class Finish>
    inline __attribute__((always_inline)) void some(const Finish& finish, int64_t many) {
        for (; many > 0 && row < end; --many, ++row, sums += width) finish(row, n, columns, sums);
    }
};

// As panel_blocks: the sums of a block are finished while the tiles multiply the next.
template <class P, class V, class Finish>
void tile_blocks(Strided<typename P::Element> a, int64_t rows, int64_t inner,
                 const typename P::Packed* packed, int64_t all_columns, PanelRange panels,
                 typename P::Sum* sums, Finish finish) {
    constexpr int64_t most = panel_columns<V>(), block = rows_of_sums<P> * most;
    const typename P::Session session;
    WaitingSums<typename P::Sum> waiting;
    bool second = false;
    for (int64_t n = panels.first * most; n < panels.last * most; n += most) {
        const int64_t columns = smaller(most, all_columns - n), width = round_up(columns, V::width);
        const typename P::Packed* panel = packed + n * inner;
        // Steps of two tiles' columns each: so many rows in each finish them all.
        const int64_t steps = inner / P::step * ((width / V::width + 1) / 2);
        const int64_t each = (rows_of_sums<P> + steps - 1) / larger(1, steps);
        for (int64_t m = 0; m < rows; m += rows_of_sums<P>) {
            typename P::Sum* out = sums + (second ? block : 0);
            second = !second;
            const int64_t many = smaller(rows_of_sums<P>, rows - m);
            const auto meanwhile = [&] { waiting.some(finish, each); };
            static_assert(V::tile_vectors == 4, "a case for each width");
#define VARIATOR_PANEL(N)                                                             \
    case N:                                                                           \
        tile_panel<P, N>(a.row(m), a.row_stride, many, inner, panel, out, meanwhile); \
        break
            switch (width / V::width) {
                VARIATOR_PANEL(1);
                VARIATOR_PANEL(2);
                VARIATOR_PANEL(3);
                VARIATOR_PANEL(4);
            }
#undef VARIATOR_PANEL
            waiting.some(finish, rows_of_sums<P>);
            waiting = {m, m + many, n, columns, width, out};
        }
    }
    waiting.some(finish, rows_of_sums<P>);
}
#else
template <class P, class V, class... Arguments>
void tile_blocks(const Arguments&...);  // nobody has tiles
#endif

template <class P, class V, class Sum, class Finish>
void plain_blocks(Strided<typename P::Element> a, int64_t rows, int64_t inner,
                  const typename P::Packed* packed, int64_t all_columns, PanelRange panels,
                  Sum* sums, Finish finish) {
    constexpr int64_t most = panel_columns<V>();
    for (int64_t n = panels.first * most; n < panels.last * most; n += most) {
        const int64_t columns = smaller(most, all_columns - n), width = round_up(columns, V::width);
        const typename P::Packed* panel = packed + n * inner;
        for (int64_t m = 0; m < rows; m += rows_of_sums<P>) {
            const int64_t many = smaller(rows_of_sums<P>, rows - m);
            const Strided<typename P::Element> some{a.row(m), a.row_stride, 1};
            if constexpr (std::is_same_v<Sum, int32_t>) {
                Nothing meanwhile;
                panel_product<P, V>(
                    some, many, 0, inner, panel, width * P::step, width,
                    [=](int64_t row) {
                        return
                            [=](int64_t column, V sum) { sum.store(sums + row * width + column); };
                    },
                    meanwhile);
            } else {
                product<P, V>(some, many, {panel, 0}, width, sums, width, inner, false);
            }
            for (int64_t i = 0; i < many; ++i) finish(m + i, n, columns, sums + i * width);
        }
    }
}

// finish(row, n, columns, sums) for each of `rows` rows of a and each panel, of columns n on; sums
// has sums_of_blocks.
template <class P, class V, class... Arguments>
void panel_blocks(const Arguments&... arguments) {
    if constexpr (P::tiles)
        tile_blocks<P, V>(arguments...);
    else
        plain_blocks<P, V>(arguments...);
}

// `parts` of the columns times chunks of `size` rows.
struct RowsSplit {
    int64_t rows, size, chunks, parts, panels;

    // `bytes`: of a row while it is worked on, `cached` of a chunk.
    template <class P, class V>
    static RowsSplit of(int64_t rows, int64_t columns, int64_t bytes, int64_t cached,
                        int64_t threads) {
        constexpr int64_t tile = tile_height<P, V>();
        // Tiles multiply faster than weights come from the third-level cache for fewer rows.
        constexpr int64_t top = P::tiles ? 384 : 96, times = P::tiles ? 3 : 1;
        const int64_t most = larger(tile, smaller(top, times * cached / bytes) / tile * tile);
        const int64_t used = larger(1, threads);
        int64_t chunks = round_up((rows + most - 1) / most, used);
        int64_t size = round_up((rows + chunks - 1) / chunks, tile);
        // A chunk or less: threads share the columns, so that each reads a part of the weights, and
        // so that all have work where there are few blocks of rows.
        const bool by_columns =
            rows <= smaller(96, most) || (rows <= most && 4 * rows < 3 * size * used);
        if (by_columns) chunks = 1, size = round_up(rows, tile);
        const int64_t panels = (columns + panel_columns<V>() - 1) / panel_columns<V>();
        return {rows, size, chunks, by_columns ? used : 1, panels};
    }

    // work(first row, rows, panels) for each.
    template <class F>
    void each(int threads, F work) const {
        for_items(chunks * parts, threads, [&](int64_t item) {
            const int64_t first = item / parts * size, part = item % parts;
            if (first < rows)
                work(first, smaller(size, rows - first),
                     PanelRange{panels * part / parts, panels * (part + 1) / parts});
        });
    }
};

}  // namespace VARIATOR_ISA
}  // namespace variator
