// The instruction sets of this build and the choice among them.
#pragma once

#include "kernels.h"

namespace ladder {

// Kernels that profit from vectors only; the wider ones have no better version of them.
struct VectorKernels {
    DequantizeFn* dequantize;
    QuantizeFn* quantize;
    CrossEntropyFn* cross_entropy;
    RmsNormFn* rms_norm;
    RotaryFn* rotary;
    SwiGluFn* swiglu;
    RmsNormBackwardFn* rms_norm_backward;
    SwiGluBackwardFn* swiglu_backward;
    SideLayerFn* side_layer;
};

struct Isa {
    const char* name;
    bool (*available)();  // whether this CPU and its operating system can run it
    ArrangeFn* arrange;
    MultiplyFn* multiply;
    const VectorKernels* vector;
};

// The set in use: the fastest available, unless another was selected.
const Isa& current_isa();

// The set of that name, or null if this build or this CPU does not have it.
const Isa* find_isa(const char* name);

// Use `isa` from now on, or the fastest available with null.
void select_isa(const Isa* isa);

}  // namespace ladder
