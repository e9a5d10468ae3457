// The FFN's GEMMs on Ampere and everything later but Hopper: CUTLASS's mma.sync kernels.
#pragma once

#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "gemm/epilogue.cuh"
#include "gemm/gemm.h"

namespace variator::cuda {

namespace visitors = cutlass::epilogue::threadblock;

// An epilogue node that applies Finish to its three inputs. CUTLASS's own compute node takes no
// run-time arguments.
template <class T>
struct FinishVisitor : visitors::VisitorImpl2x<> {
    using Arguments = FinishArguments;
    using Params = Arguments;
    struct SharedStorage {};
    Params how;

    template <class Shape>
    static constexpr Params to_underlying_arguments(const Shape&, const Arguments& given, void*) {
        return given;
    }
    template <class Shape>
    static size_t get_workspace_size(const Shape&, const Arguments&) {
        return 0;
    }
    CUTLASS_HOST_DEVICE FinishVisitor() : how{} {}
    CUTLASS_HOST_DEVICE FinishVisitor(const Params& params, const SharedStorage&) : how(params) {}

    struct Callbacks : visitors::EmptyCallbacks {
        Params how;
        CUTLASS_DEVICE explicit Callbacks(const Params& params) : how(params) {}

        template <int count>
        CUTLASS_DEVICE cutlass::Array<T, count> visit(int, int, int, int,
                                                      const cutlass::Array<float, count>&,
                                                      const cutlass::Array<float, count>& acc,
                                                      const cutlass::Array<T, count>& bias,
                                                      const cutlass::Array<T, count>& factor) {
            using Floats = cutlass::Array<float, count>;
            cutlass::NumericArrayConverter<float, T, count> widen;
            cutlass::NumericArrayConverter<T, float, count> narrow;
            return narrow(Finish<Floats>{}(acc, widen(bias), widen(factor), how));
        }
    };
    template <class Shape>
    CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord, int, const Shape&) {
        return Callbacks(how);
    }
};

// Loads the factor [rows, columns] if there is one. CUTLASS's own load does not check and would
// read from address 0.
template <class Threads, class T, class Stride>
struct FactorLoad : visitors::VisitorAuxLoad<Threads, T, Stride> {
    using Load = visitors::VisitorAuxLoad<Threads, T, Stride>;
    using Load::Load;

    template <class Loads>
    struct Callbacks : Loads {
        CUTLASS_DEVICE explicit Callbacks(const Loads& loads) : Loads(loads) {}
        CUTLASS_DEVICE void begin_step(int step) {
            if (this->params_ptr->ptr_aux != nullptr)
                Loads::begin_step(step);
            else
                cute::clear(this->tC_rAux);  // it is read, but not used
        }
    };
    template <class Shape>
    CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread,
                                      const Shape& shape) {
        auto loads = Load::get_callbacks(tile, thread, shape);
        return Callbacks<decltype(loads)>(loads);
    }
};

template <class T, int rows, int columns>
struct GemmSm80 {
    using Tile = cutlass::gemm::GemmShape<rows, columns, 32>;
    using WarpTile = cutlass::gemm::GemmShape<64, 64, 32>;
    using Instruction = cutlass::gemm::GemmShape<16, 8, 16>;
    using Row = cutlass::layout::RowMajor;
    using Column = cutlass::layout::ColumnMajor;
    static constexpr int alignment = 8, stages = 4;

    using Threads = visitors::OutputTileThreadLayout<Tile, WarpTile, T, alignment, 1>;
    using Bias =
        visitors::VisitorRowBroadcast<Threads, T, cute::Stride<cute::_0, cute::_1, int64_t>>;
    using Matrix = cute::Stride<int64_t, cute::_1, int64_t>;
    using Factor = FactorLoad<Threads, T, Matrix>;
    using Store =
        visitors::VisitorAuxStore<Threads, T, cutlass::FloatRoundStyle::round_to_nearest, Matrix>;
    using Tree = visitors::Sm80EVT<
        Store, visitors::Sm80EVT<FinishVisitor<T>, visitors::VisitorAccFetch, Bias, Factor>>;
    using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
        T, Row, cutlass::ComplexTransform::kNone, alignment, T, Column,
        cutlass::ComplexTransform::kNone, alignment, T, Row, alignment, float, float,
        cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Tile, WarpTile, Instruction, Tree,
        cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, stages,
        cutlass::arch::OpMultiplyAdd, 1>::GemmKernel;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

    static cudaError_t run(const GemmParams& p, int, cudaStream_t stream) {
        const int m = static_cast<int>(p.rows), n = static_cast<int>(p.columns),
                  k = static_cast<int>(p.inner);
        const Matrix matrix{p.columns, cute::_1{}, p.rows * p.columns};
        // CUTLASS only reads them, but wants pointers to non-const.
        T* bias = static_cast<T*>(const_cast<void*>(p.bias));
        T* factor = static_cast<T*>(const_cast<void*>(p.factor));
        typename Tree::Arguments epilogue{
            {{}, {bias, T(0), {}}, {factor, T(0), matrix}, {p.activation, factor != nullptr}},
            {static_cast<T*>(p.out), matrix}};
        typename Gemm::Arguments arguments(
            cutlass::gemm::GemmUniversalMode::kGemm, {m, n, k}, 1, epilogue, p.a, p.weight, nullptr,
            nullptr, p.rows * p.inner, p.columns * p.inner, 0, 0, p.inner, p.inner, 0, 0);
        return run_cutlass<Gemm>(arguments, stream);
    }
};

template <int rows, int columns, DType dtype>
GemmKernel gemm_sm80() {
    using Gemm = GemmSm80<CutlassType<dtype>, rows, columns>;
    return {Gemm::run, sizeof(typename Gemm::Kernel::SharedStorage)};
}

}  // namespace variator::cuda
