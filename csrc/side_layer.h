// What a side layer computes around its attention, for few rows: every product of a row is a pass over weights that fit
// in the second-level cache. Written so that a compiler vectorizes it, with internal linkage (see scales.h). Roundings
// are those of the same formula in torch: fp32 weights to the dtype of the state as they are read, and every result.
#pragma once

#include "elementwise.h"

namespace ladder {
namespace {

// Columns of the widest row that is multiplied.
inline int64_t side_layer_widest(const SideLayer& call) {
    const int64_t mixed = call.heads * call.head_dim, widest = call.width > call.inner ? call.width : call.inner;
    return widest > mixed ? widest : mixed;
}

inline int64_t side_layer_scratch(const SideLayer& call) {
    const int64_t heads = (call.heads + 2 * call.kv_heads) * call.head_dim;
    const int64_t columns = heads > 2 * call.inner ? heads : 2 * call.inner;
    return (side_layer_widest(call) + 3 * call.width + call.inner + columns) * static_cast<int64_t>(sizeof(float));
}

template <typename T, float (*ToFloat)(T), T (*FromFloat)(float)>
struct SideLayerOf {
    using Rows = Elementwise<T, ToFloat, FromFloat>;

    // A row's intermediate results, one after the other in memory of side_layer_scratch(call) bytes.
    struct Scratch {
        float* wide;
        T *norm_weight, *normed, *u, *activation, *columns;

        Scratch(const SideLayer& call, void* memory) : wide(static_cast<float*>(memory)) {
            norm_weight = reinterpret_cast<T*>(wide + side_layer_widest(call));
            normed = norm_weight + call.width;
            u = normed + call.width;
            activation = u + call.width;
            columns = activation + call.inner;
        }
    };

    static float rounded(float value) { return ToFloat(FromFloat(value)); }

    // One row of x [cols] times weight [rows, cols], plus the residual [rows] where there is one.
    template <typename W, float (*Weight)(W)>
    static void linear(const T* x, const void* weights, int64_t rows, int64_t cols, const T* residual, T* out,
                       float* values) {
        constexpr int64_t kLanes = 32;
        for (int64_t i = 0; i < cols; ++i) values[i] = ToFloat(x[i]);
        for (int64_t row = 0; row < rows; ++row) {
            const W* weight = static_cast<const W*>(weights) + row * cols;
            float sums[kLanes] = {};
            int64_t i = 0;
            for (; i + kLanes <= cols; i += kLanes)
                for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += values[i + lane] * Weight(weight[i + lane]);
            float sum = 0.0f;
            for (; i < cols; ++i) sum += values[i] * Weight(weight[i]);
            for (int64_t width = kLanes / 2; width > 0; width /= 2)
                for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
            sum += sums[0];
            out[row] = FromFloat(residual == nullptr ? sum : ToFloat(residual[row]) + rounded(sum));
        }
    }

    static void linear(const SideLayer& call, const T* x, const void* weights, int64_t rows, int64_t cols,
                       const T* residual, T* out, float* values) {
        call.wide_weights ? linear<float, rounded>(x, weights, rows, cols, residual, out, values)
                          : linear<T, ToFloat>(x, weights, rows, cols, residual, out, values);
    }

    // The norm of one row; its weight is rounded like the others.
    static void norm(const SideLayer& call, const T* x, const void* weight, const Scratch& scratch) {
        for (int64_t i = 0; i < call.width; ++i)
            scratch.norm_weight[i] =
                call.wide_weights ? FromFloat(static_cast<const float*>(weight)[i]) : static_cast<const T*>(weight)[i];
        const int64_t width = call.width;
        Rows::rms_norm({x, scratch.norm_weight, scratch.normed, 1, width, width, call.epsilon, call.dtype}, 0, 1);
    }

    static void heads(const SideLayer& call, int64_t begin, int64_t end, const Scratch& scratch) {
        const int64_t rotated = call.heads + call.kv_heads, size = call.head_dim;
        const int64_t columns = (rotated + call.kv_heads) * size;
        for (int64_t row = begin; row < end; ++row) {
            T* out = static_cast<T*>(call.out) + row * columns;
            norm(call, static_cast<const T*>(call.state) + row * call.width, call.attention_norm, scratch);
            linear(call, scratch.normed, call.qkv, columns, call.width, nullptr, scratch.columns, scratch.wide);
            const T* cosines = static_cast<const T*>(call.cos) + row * size;
            const T* sines = static_cast<const T*>(call.sin) + row * size;
            const Rotary turn = {scratch.columns, cosines, sines, out, 1, rotated, size, columns, columns, call.dtype, 0};
            Rows::rotary(turn, 0, 1);
            for (int64_t i = rotated * size; i < columns; ++i) out[i] = scratch.columns[i];
        }
    }

    static void mlp(const SideLayer& call, int64_t begin, int64_t end, const Scratch& scratch) {
        const int64_t width = call.width, inner = call.inner, mixed = call.heads * call.head_dim;
        for (int64_t row = begin; row < end; ++row) {
            const T* state = static_cast<const T*>(call.state) + row * width;
            const T* values = static_cast<const T*>(call.mixed) + row * mixed;
            linear(call, values, call.attention_out, width, mixed, state, scratch.u, scratch.wide);
            norm(call, scratch.u, call.mlp_norm, scratch);
            T *gate = scratch.columns, *up = gate + inner;
            linear(call, scratch.normed, call.gate_up, 2 * inner, width, nullptr, gate, scratch.wide);
            Rows::swiglu({gate, up, scratch.activation, 1, inner, inner, inner, call.dtype}, 0, 1);
            T* out = static_cast<T*>(call.out) + row * width;
            linear(call, scratch.activation, call.mlp_out, width, inner, scratch.u, out, scratch.wide);
        }
    }
};

template <typename Kernels>
void side_layer_rows(const SideLayer& call, int64_t begin, int64_t end, void* memory) {
    const typename Kernels::Scratch scratch(call, memory);
    call.mixed == nullptr ? Kernels::heads(call, begin, end, scratch) : Kernels::mlp(call, begin, end, scratch);
}

inline void side_layer_any(const SideLayer& call, int64_t begin, int64_t end, void* memory) {
    if (call.dtype == kFloat32) return side_layer_rows<SideLayerOf<float, as_is, as_is>>(call, begin, end, memory);
    if (call.dtype == kBFloat16)
        return side_layer_rows<SideLayerOf<uint16_t, bf16_to_float, float_to_bf16>>(call, begin, end, memory);
    side_layer_rows<SideLayerOf<uint16_t, fp16_to_float, float_to_fp16>>(call, begin, end, memory);
}

}  // namespace
}  // namespace ladder
