// The FFN's GEMMs on Hopper: CUTLASS's warp-specialised kernels (TMA, wgmma).
#pragma once

#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "gemm/epilogue.cuh"
#include "gemm/gemm.h"

namespace variator::cuda {

namespace fusion = cutlass::epilogue::fusion;

// Passes the epilogue's source matrix C on as `factor`; C is loaded only if there is one.
template <class T>
struct FetchFactor {
    struct SharedStorage {};
    struct Arguments {
        bool given;
    };
    using Params = Arguments;
    Params params;

    template <class Shape>
    static constexpr Params to_underlying_arguments(const Shape&, const Arguments& given, void*) {
        return given;
    }
    template <class Shape>
    static bool can_implement(const Shape&, const Arguments&) {
        return true;
    }
    template <class Shape>
    static size_t get_workspace_size(const Shape&, const Arguments&) {
        return 0;
    }
    template <class Shape>
    static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                                cutlass::CudaHostAdapter* = nullptr) {
        return cutlass::Status::kSuccess;
    }

    CUTLASS_HOST_DEVICE FetchFactor() : params{} {}
    CUTLASS_HOST_DEVICE FetchFactor(const Params& p, const SharedStorage&) : params(p) {}
    CUTLASS_DEVICE bool is_producer_load_needed() const { return params.given; }
    CUTLASS_DEVICE bool is_C_load_needed() const { return params.given; }

    template <class... Args>
    CUTLASS_DEVICE auto get_producer_load_callbacks(
        const fusion::detail::ProducerLoadArgs<Args...>&) {
        return fusion::detail::EmptyProducerLoadCallbacks{};
    }
    template <bool reference_source, class... Args>
    CUTLASS_DEVICE auto get_consumer_store_callbacks(
        const fusion::detail::ConsumerStoreArgs<Args...>& args) {
        return typename fusion::Sm90SrcFetch<T>::template ConsumerStoreCallbacks<
            cute::remove_cvref_t<decltype(args.tCrC)>>(args.tCrC);
    }
};

template <class T, class Tile, class Cluster, class Mainloop, class Epilogue>
struct GemmSm90 {
    using Row = cutlass::layout::RowMajor;
    using Column = cutlass::layout::ColumnMajor;
    static constexpr int alignment = 8;
    using Arguments = FinishArguments;

    using Callbacks = fusion::Sm90EVT<
        fusion::Sm90Compute<Finish, T, float, cutlass::FloatRoundStyle::round_to_nearest>,
        fusion::Sm90AccFetch, fusion::Sm90RowBroadcast<0, Tile, T, float>, FetchFactor<T>>;
    using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
        cutlass::epilogue::collective::EpilogueTileAuto, float, float, T, Row, alignment, T, Row,
        alignment, Epilogue, Callbacks>::CollectiveOp;
    using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, Row, alignment, T, Column,
        alignment, float, Tile, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
            sizeof(typename CollectiveEpilogue::SharedStorage))>,
        Mainloop>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>,
                                                        CollectiveMainloop, CollectiveEpilogue>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

    static typename Gemm::Arguments arguments(const GemmParams& p, int multiprocessors) {
        const int m = static_cast<int>(p.rows), n = static_cast<int>(p.columns),
                  k = static_cast<int>(p.inner);
        const auto stride_a =
            cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {m, k, 1});
        const auto stride_b =
            cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {n, k, 1});
        const auto stride_c =
            cutlass::make_cute_packed_stride(typename Kernel::StrideC{}, {m, n, 1});
        const auto stride_d =
            cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {m, n, 1});
        const bool multiply = p.factor != nullptr;
        typename Gemm::Arguments arguments{
            cutlass::gemm::GemmUniversalMode::kGemm,
            {m, n, k, 1},
            {static_cast<const T*>(p.a), stride_a, static_cast<const T*>(p.weight), stride_b},
            {{{}, {static_cast<const T*>(p.bias), T(0), {}}, {multiply}, {p.activation, multiply}},
             static_cast<const T*>(multiply ? p.factor : p.out),
             stride_c,
             static_cast<T*>(p.out),
             stride_d}};
        arguments.hw_info.sm_count = multiprocessors;
        return arguments;
    }

    static cudaError_t run(const GemmParams& p, int multiprocessors, cudaStream_t stream) {
        return run_cutlass<Gemm>(arguments(p, multiprocessors), stream);
    }
};

// The schedule for each output tile: the cluster of thread blocks that share TMA loads, and how the
// warps of a block divide the work.
template <int rows, int columns>
struct Schedule;

// Two groups of warps make a tile together.
struct Cooperative {
    using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
    using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
    using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};

template <>
struct Schedule<128, 192> : Cooperative {};
template <>
struct Schedule<128, 256> : Cooperative {};

// Each makes a tile of its own: one's epilogue runs beside the other's products.
template <>
struct Schedule<64, 128> {
    using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
    using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
    using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

template <int rows, int columns, DType dtype>
using HopperGemm =
    GemmSm90<CutlassType<dtype>, cute::Shape<cute::Int<rows>, cute::Int<columns>, cute::_64>,
             typename Schedule<rows, columns>::Cluster, typename Schedule<rows, columns>::Mainloop,
             typename Schedule<rows, columns>::Epilogue>;

template <int rows, int columns, DType dtype>
GemmKernel gemm_sm90() {
    using Gemm = HopperGemm<rows, columns, dtype>;
    return {Gemm::run, Gemm::Kernel::SharedStorageSize};
}

}  // namespace variator::cuda
