// The kernels of the instruction set in use, their rows split over threads.
#pragma once

#include "isa.h"
#include "parallel.h"

namespace ladder {

// Elements per thread below which starting one costs more than it saves.
constexpr int64_t kMultiplyGrain = 1 << 16;
constexpr int64_t kElementwiseGrain = 1 << 14;
constexpr int64_t kRowMultiple = 16;  // rows that a kernel may compute together

// Rows of `width` elements that are worth a thread.
inline int64_t row_grain(int64_t elements, int64_t width) {
    const int64_t rows = elements / (width > 0 ? width : 1);
    return rows > 0 ? rows : 1;
}

// The product, its x arranged.
inline void multiply(const NF4View& view, const Product& product, int64_t threads) {
    MultiplyFn* kernel = current_isa().multiply;
    const int64_t rows = row_grain(kMultiplyGrain, product.cols);
    const int64_t grain = (rows + kRowMultiple - 1) / kRowMultiple * kRowMultiple;
    parallel_for(product.rows, grain, threads,
                 [&](int64_t begin, int64_t end) { kernel(view, product, begin, end); });
}

inline void rms_norm(const RmsNorm& call, int64_t threads) {
    RmsNormFn* kernel = current_isa().vector->rms_norm;
    parallel_for(call.rows, row_grain(kElementwiseGrain, call.width), threads,
                 [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

inline void rotary(const Rotary& call, int64_t threads) {
    RotaryFn* kernel = current_isa().vector->rotary;
    parallel_for(call.tokens, row_grain(kElementwiseGrain, call.heads * call.head_dim), threads,
                 [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

inline void swiglu(const SwiGlu& call, int64_t threads) {
    SwiGluFn* kernel = current_isa().vector->swiglu;
    parallel_for(call.rows, row_grain(kElementwiseGrain, call.width), threads,
                 [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

inline void rms_norm_backward(const RmsNormBackward& call, int64_t threads) {
    RmsNormBackwardFn* kernel = current_isa().vector->rms_norm_backward;
    const int64_t rows = row_grain(kElementwiseGrain, call.width);
    const int64_t grain = (rows + kNormBlock - 1) / kNormBlock * kNormBlock;
    parallel_for(call.rows, grain, threads, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

inline void swiglu_backward(const SwiGluBackward& call, int64_t threads) {
    SwiGluBackwardFn* kernel = current_isa().vector->swiglu_backward;
    parallel_for(call.rows, row_grain(kElementwiseGrain, call.width), threads,
                 [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

}  // namespace ladder
