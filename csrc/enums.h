// The enumerations that Python and C++ share, once: name in Python and C++, value. The bindings
// hand them to Python as dictionaries (enum_values below), so no number stands anywhere else.
#pragma once

#define VARIATOR_DTYPES(X) X(float32, 0) X(bfloat16, 1) X(float16, 2) X(float64, 3)
#define VARIATOR_NORMS(X) X(none, 0) X(rms, 1) X(layer, 2)
#define VARIATOR_ADAPTER_ACTIVATIONS(X) X(identity, 0) X(tanh, 1)
#define VARIATOR_ATTENTION_PATHS(X) X(automatic, 0) X(packed, 1) X(direct, 2)
#define VARIATOR_FFN_ACTIVATIONS(X) X(none, 0) X(relu, 1) X(gelu, 2) X(gelu_tanh, 3) X(silu, 4)

#define VARIATOR_ENUMERATOR(name, value) name = value,
#define VARIATOR_ENUM_ENTRY(name, value) {#name, value},

namespace variator {

enum class DType : int { VARIATOR_DTYPES(VARIATOR_ENUMERATOR) };
enum class Norm : int { VARIATOR_NORMS(VARIATOR_ENUMERATOR) };
enum class Phi : int { VARIATOR_ADAPTER_ACTIVATIONS(VARIATOR_ENUMERATOR) };
enum class AttentionPath : int { VARIATOR_ATTENTION_PATHS(VARIATOR_ENUMERATOR) };
enum class Activation : int { VARIATOR_FFN_ACTIVATIONS(VARIATOR_ENUMERATOR) };

}  // namespace variator
