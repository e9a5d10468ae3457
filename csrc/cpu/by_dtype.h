// A kernel for whatever storage type its params name.
#pragma once

#include "params.h"

#ifdef VARIATOR_HAS_DOUBLE
#define VARIATOR_DOUBLE(kernel) \
    case DType::float64:        \
        return kernel<VecDouble, DType::float64>(p)
#else
#define VARIATOR_DOUBLE(kernel) \
    case DType::float64:        \
        return
#endif

#define VARIATOR_BY_DTYPE(kernel, Params)               \
    inline void kernel##_any(const Params& p) {         \
        switch (p.dtype) {                              \
            case DType::float32:                        \
                return kernel<Vec, DType::float32>(p);  \
            case DType::bfloat16:                       \
                return kernel<Vec, DType::bfloat16>(p); \
            case DType::float16:                        \
                return kernel<Vec, DType::float16>(p);  \
                VARIATOR_DOUBLE(kernel);                \
        }                                               \
    }
