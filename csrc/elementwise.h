// RMSNorm, rotary embedding and SwiGLU with their gradients, written so that a compiler vectorizes them: each instruction
// set's file compiles its own copy, with internal linkage (see scales.h).
#pragma once

#include <cmath>

#include "exp.h"
#include "floats.h"
#include "kernels.h"

namespace ladder {
namespace {

template <typename T, float (*ToFloat)(T), T (*FromFloat)(float)>
struct Elementwise {
    static void rms_norm(const RmsNorm& call, int64_t first_row, int64_t end_row) {
        constexpr int64_t kLanes = 16;
        const T* weight = static_cast<const T*>(call.weight);
        for (int64_t row = first_row; row < end_row; ++row) {
            const T* x = static_cast<const T*>(call.x) + row * call.x_stride;
            T* out = static_cast<T*>(call.out) + row * call.width;
            float sums[kLanes] = {};
            int64_t i = 0;
            for (; i + kLanes <= call.width; i += kLanes)
                for (int64_t lane = 0; lane < kLanes; ++lane) {
                    const float value = ToFloat(x[i + lane]);
                    sums[lane] += value * value;
                }
            double sum = 0.0;
            for (; i < call.width; ++i) sum += static_cast<double>(ToFloat(x[i])) * static_cast<double>(ToFloat(x[i]));
            for (const float lane : sums) sum += static_cast<double>(lane);
            const double mean = sum / static_cast<double>(call.width);
            const float scale = static_cast<float>(1.0 / std::sqrt(mean + static_cast<double>(call.epsilon)));
            for (i = 0; i < call.width; ++i) {
                const float normed = ToFloat(FromFloat(ToFloat(x[i]) * scale));
                out[i] = FromFloat(normed * ToFloat(weight[i]));
            }
        }
    }

    // Sums over the columns are in fp32 by lanes and in fp64 across them, as in the forward pass.
    static void rms_norm_backward(const RmsNormBackward& call, int64_t first_row, int64_t end_row) {
        constexpr int64_t kLanes = 16;
        const int64_t width = call.width;
        const T* __restrict weight = static_cast<const T*>(call.weight);
        for (int64_t row = first_row; row < end_row; ++row) {
            const T* __restrict x = static_cast<const T*>(call.x) + row * width;
            const T* __restrict dout = static_cast<const T*>(call.dout) + row * width;
            const T* __restrict residual = static_cast<const T*>(call.residual) + row * width;
            T* __restrict dx = static_cast<T*>(call.dx) + row * width;
            float* __restrict dweight = call.dweight + row / kNormBlock * width;
            float squares[kLanes] = {}, products[kLanes] = {};
            int64_t i = 0;
            for (; i + kLanes <= width; i += kLanes)
                for (int64_t lane = 0; lane < kLanes; ++lane) {
                    const float value = ToFloat(x[i + lane]);
                    squares[lane] += value * value;
                    products[lane] += value * (ToFloat(dout[i + lane]) * ToFloat(weight[i + lane]));
                }
            for (int64_t lane = 0; i + lane < width; ++lane) {
                const float value = ToFloat(x[i + lane]);
                squares[lane] += value * value;
                products[lane] += value * (ToFloat(dout[i + lane]) * ToFloat(weight[i + lane]));
            }
            double square = 0.0, product = 0.0;
            for (const float lane : squares) square += static_cast<double>(lane);
            for (const float lane : products) product += static_cast<double>(lane);
            const double columns = static_cast<double>(width);
            const double inverse = 1.0 / std::sqrt(square / columns + static_cast<double>(call.epsilon));
            const float scale = static_cast<float>(inverse);
            const float share = static_cast<float>(product / columns * inverse * inverse);
            if (row % kNormBlock == 0)
                for (i = 0; i < width; ++i) dweight[i] = 0.0f;
            for (i = 0; i < width; ++i) {
                const float value = ToFloat(x[i]), gradient = ToFloat(dout[i]);
                dx[i] = FromFloat(ToFloat(residual[i]) + scale * (gradient * ToFloat(weight[i]) - value * share));
                dweight[i] += gradient * (value * scale);
            }
        }
    }

    // Rounded to the dtype, as torch rounds what a sum is made of.
    static float product(float x, T factor) { return ToFloat(FromFloat(x * ToFloat(factor))); }

    // The pointers of a head are parameters: only there does GCC believe `restrict`, and so many pointers it would not
    // compare with each other at run time.
    static void rotary_head(const T* __restrict x, const T* __restrict cosines, const T* __restrict first_sines,
                            const T* __restrict second_sines, T* __restrict first_out, T* __restrict second_out,
                            float sign, int64_t half) {
        for (int64_t i = 0; i < half; ++i) {
            const float first = ToFloat(x[i]), second = ToFloat(x[i + half]);
            first_out[i] = FromFloat(product(first, cosines[i]) - sign * product(second, first_sines[i]));
            second_out[i] = FromFloat(product(second, cosines[i + half]) + sign * product(first, second_sines[i]));
        }
    }

    static void rotary(const Rotary& call, int64_t first_token, int64_t end_token) {
        const int64_t half = call.head_dim / 2;
        // Of the transposed rotation, each half has the sines of the other one, negated.
        const float sign = call.is_backward ? -1.0f : 1.0f;
        for (int64_t token = first_token; token < end_token; ++token) {
            const T* cosines = static_cast<const T*>(call.cos) + token * call.head_dim;
            const T* sines = static_cast<const T*>(call.sin) + token * call.head_dim;
            const T* first_sines = call.is_backward ? sines + half : sines;
            const T* second_sines = call.is_backward ? sines : sines + half;
            for (int64_t head = 0; head < call.heads; ++head) {
                const T* x = static_cast<const T*>(call.x) + token * call.x_stride + head * call.head_dim;
                T* out = static_cast<T*>(call.out) + token * call.out_stride + head * call.head_dim;
                rotary_head(x, cosines, first_sines, second_sines, out, out + half, sign, half);
            }
        }
    }

    static float sigmoid(float value) {
        const float e = exp_nonpositive(-std::fabs(value));
        return (value < 0.0f ? e : 1.0f) / (1.0f + e);
    }

    static void swiglu(const SwiGlu& call, int64_t first_row, int64_t end_row) {
        for (int64_t row = first_row; row < end_row; ++row) {
            const T* gate = static_cast<const T*>(call.gate) + row * call.gate_stride;
            const T* up = static_cast<const T*>(call.up) + row * call.up_stride;
            T* out = static_cast<T*>(call.out) + row * call.width;
            for (int64_t i = 0; i < call.width; ++i) {
                const float value = ToFloat(gate[i]);
                out[i] = FromFloat(ToFloat(FromFloat(value * sigmoid(value))) * ToFloat(up[i]));
            }
        }
    }

    // d silu(g) / dg = s + g * s * (1 - s) with the sigmoid s of g.
    static void swiglu_backward_row(const T* __restrict gate, const T* __restrict up, const T* __restrict dout,
                                    T* __restrict activation, T* __restrict dgate, T* __restrict dup, int64_t width) {
        for (int64_t i = 0; i < width; ++i) {
            const float value = ToFloat(gate[i]), factor = ToFloat(up[i]), gradient = ToFloat(dout[i]);
            const float share = sigmoid(value), silu = value * share;
            activation[i] = FromFloat(ToFloat(FromFloat(silu)) * factor);
            dgate[i] = FromFloat(gradient * factor * (share + silu * (1.0f - share)));
            dup[i] = FromFloat(gradient * silu);
        }
    }

    static void swiglu_backward(const SwiGluBackward& call, int64_t first_row, int64_t end_row) {
        const int64_t width = call.width;
        for (int64_t row = first_row; row < end_row; ++row) {
            const T* gate = static_cast<const T*>(call.gate_up) + 2 * row * width;
            const T* dout = static_cast<const T*>(call.dout) + row * width;
            T* activation = static_cast<T*>(call.activation) + row * width;
            T* dgate = static_cast<T*>(call.dgate_up) + 2 * row * width;
            swiglu_backward_row(gate, gate + width, dout, activation, dgate, dgate + width, width);
        }
    }
};

using OfFloat32 = Elementwise<float, as_is, as_is>;
using OfBFloat16 = Elementwise<uint16_t, bf16_to_float, float_to_bf16>;
using OfFloat16 = Elementwise<uint16_t, fp16_to_float, float_to_fp16>;

inline void rms_norm_any(const RmsNorm& call, int64_t begin, int64_t end) {
    if (call.dtype == kFloat32) return OfFloat32::rms_norm(call, begin, end);
    call.dtype == kBFloat16 ? OfBFloat16::rms_norm(call, begin, end) : OfFloat16::rms_norm(call, begin, end);
}

inline void rotary_any(const Rotary& call, int64_t begin, int64_t end) {
    if (call.dtype == kFloat32) return OfFloat32::rotary(call, begin, end);
    call.dtype == kBFloat16 ? OfBFloat16::rotary(call, begin, end) : OfFloat16::rotary(call, begin, end);
}

inline void swiglu_any(const SwiGlu& call, int64_t begin, int64_t end) {
    if (call.dtype == kFloat32) return OfFloat32::swiglu(call, begin, end);
    call.dtype == kBFloat16 ? OfBFloat16::swiglu(call, begin, end) : OfFloat16::swiglu(call, begin, end);
}

inline void rms_norm_backward_any(const RmsNormBackward& call, int64_t begin, int64_t end) {
    if (call.dtype == kFloat32) return OfFloat32::rms_norm_backward(call, begin, end);
    call.dtype == kBFloat16 ? OfBFloat16::rms_norm_backward(call, begin, end)
                            : OfFloat16::rms_norm_backward(call, begin, end);
}

inline void swiglu_backward_any(const SwiGluBackward& call, int64_t begin, int64_t end) {
    if (call.dtype == kFloat32) return OfFloat32::swiglu_backward(call, begin, end);
    call.dtype == kBFloat16 ? OfBFloat16::swiglu_backward(call, begin, end)
                            : OfFloat16::swiglu_backward(call, begin, end);
}

}  // namespace
}  // namespace ladder
