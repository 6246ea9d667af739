// RMSNorm, rotary embedding and SwiGLU, written so that a compiler vectorizes them: each instruction set's file compiles
// its own copy, with internal linkage (see scales.h).
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

    // Rounded to the dtype, as torch rounds what a sum is made of.
    static float product(float x, T factor) { return ToFloat(FromFloat(x * ToFloat(factor))); }

    static void rotary(const Rotary& call, int64_t first_token, int64_t end_token) {
        const int64_t half = call.head_dim / 2;
        for (int64_t token = first_token; token < end_token; ++token) {
            const T* cosines = static_cast<const T*>(call.cos) + token * call.head_dim;
            const T* sines = static_cast<const T*>(call.sin) + token * call.head_dim;
            for (int64_t head = 0; head < call.heads; ++head) {
                const T* x = static_cast<const T*>(call.x) + token * call.x_stride + head * call.head_dim;
                T* out = static_cast<T*>(call.out) + (token * call.heads + head) * call.head_dim;
                for (int64_t i = 0; i < half; ++i) {
                    const float first = ToFloat(x[i]), second = ToFloat(x[i + half]);
                    out[i] = FromFloat(product(first, cosines[i]) - product(second, sines[i]));
                    out[i + half] = FromFloat(product(second, cosines[i + half]) + product(first, sines[i + half]));
                }
            }
        }
    }

    static void swiglu(const SwiGlu& call, int64_t first_row, int64_t end_row) {
        for (int64_t row = first_row; row < end_row; ++row) {
            const T* gate = static_cast<const T*>(call.gate) + row * call.gate_stride;
            const T* up = static_cast<const T*>(call.up) + row * call.up_stride;
            T* out = static_cast<T*>(call.out) + row * call.width;
            for (int64_t i = 0; i < call.width; ++i) {
                const float value = ToFloat(gate[i]);
                const float e = exp_nonpositive(-std::fabs(value));
                const float sigmoid = (value < 0.0f ? e : 1.0f) / (1.0f + e);
                out[i] = FromFloat(ToFloat(FromFloat(value * sigmoid)) * ToFloat(up[i]));
            }
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

}  // namespace
}  // namespace ladder
