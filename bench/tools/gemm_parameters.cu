// Prints what CUTLASS passes to the kernel of a product on Hopper in bf16: a line with the grid and
// the threads of a block, then the bytes of the parameters. Without a driver the descriptors of TMA
// stay empty; addresses are made up. Arguments: the tile's rows and columns, multiprocessors, rows,
// columns, inner, activation, whether there is a bias, and a factor.
#include <cstdio>
#include <cstdlib>

#include "gemm/gemm_sm90.cuh"

using namespace variator::cuda;

template <int rows, int columns>
void print(const GemmParams& p, int multiprocessors) {
    using Gemm = HopperGemm<rows, columns, DType::bfloat16>;
    using Kernel = typename Gemm::Kernel;
    const auto params =
        Kernel::to_underlying_arguments(Gemm::arguments(p, multiprocessors), nullptr);
    const dim3 grid = Kernel::get_grid_shape(params), block = Kernel::get_block_shape();
    std::printf("%u %u %u %u\n", grid.x, grid.y, grid.z, block.x * block.y * block.z);
    std::fwrite(&params, sizeof(params), 1, stdout);
}

int main(int count, char** given) {
    if (count != 10) return 1;
    int64_t number[9];
    for (int i = 0; i < 9; ++i) number[i] = std::atoll(given[i + 1]);
    const auto place = [](int64_t n) {
        return reinterpret_cast<void*>(0x7f0000000000 + (n << 32));
    };
    const GemmParams p{DType::bfloat16,
                       number[3],
                       number[4],
                       number[5],
                       place(1),
                       place(2),
                       number[7] ? place(3) : nullptr,
                       static_cast<Activation>(number[6]),
                       number[8] ? place(4) : nullptr,
                       place(5)};
    const int multiprocessors = static_cast<int>(number[2]);
    if (number[0] == 128 && number[1] == 192)
        print<128, 192>(p, multiprocessors);
    else if (number[0] == 128 && number[1] == 256)
        print<128, 256>(p, multiprocessors);
    else if (number[0] == 64 && number[1] == 128)
        print<64, 128>(p, multiprocessors);
    else
        return 1;
    return 0;
}
