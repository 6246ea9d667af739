// NF4 encode, written so that a compiler vectorizes it: each instruction set's file compiles its own copy, with internal
// linkage (see scales.h).
#pragma once

#include <cmath>

#include "floats.h"
#include "kernels.h"

namespace ladder {
namespace {

constexpr int64_t kMaxBlock = 4096;
constexpr float kSmallestAbsmax = 1e-38f;  // bitsandbytes' floor: an all-zero block divides by this

// Number of thresholds below `value`: the code. NaN is below none, so it counts them all.
inline uint8_t encode(float value, const float* thresholds) {
    int32_t code = 0;
    for (int i = 0; i < 15; ++i) code += !(value <= thresholds[i]);
    return static_cast<uint8_t>(code);
}

// The largest bit pattern of |value| is the largest magnitude, and any NaN beats every number.
inline float block_absmax(const float* block, int64_t size) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < size; ++i) {
        const uint32_t magnitude = float_bits(block[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    return bits_float(largest);
}

// Codes of values[0 .. size), two to a byte; an odd size is padded with a zero. Compilers vectorize the counting.
struct CountThresholds {
    static void pack(const float* values, int64_t size, const float* thresholds, uint8_t* packed) {
        uint8_t codes[kMaxBlock];
        for (int64_t i = 0; i < size; ++i) codes[i] = encode(values[i], thresholds);
        if (size & 1) codes[size] = encode(0.0f, thresholds);
        for (int64_t i = 0; i < (size + 1) / 2; ++i)
            packed[i] = static_cast<uint8_t>((codes[2 * i] << 4) | codes[2 * i + 1]);
    }
};

template <typename Encoder, typename In, float (*ToFloat)(In)>
void quantize_blocks(const In* weight, const float* thresholds, int64_t first, int64_t count, int64_t total,
                     int64_t block_size, uint8_t* packed, float* absmax) {
    float values[kMaxBlock];
    const int64_t end = first + count;
    for (int64_t begin = first; begin < end; begin += block_size) {
        const int64_t size = begin + block_size <= total ? block_size : total - begin;
        for (int64_t i = 0; i < size; ++i) values[i] = ToFloat(weight[begin + i]);

        const float largest = block_absmax(values, size);
        const float divisor = largest < kSmallestAbsmax ? kSmallestAbsmax : largest;
        if (size == block_size) {
            absmax[begin / block_size] = largest;
            const float reciprocal = 1.0f / divisor;
            for (int64_t i = 0; i < size; ++i) values[i] *= reciprocal;
        } else {
            absmax[begin / block_size] = divisor;
            for (int64_t i = 0; i < size; ++i) values[i] /= divisor;
        }
        Encoder::pack(values, size, thresholds, packed + begin / 2);
    }
}

template <typename Encoder>
void quantize_any(const void* weight, int32_t dtype, const float* thresholds, int64_t first, int64_t count,
                  int64_t total, int64_t block_size, uint8_t* packed, float* absmax) {
    const uint16_t* narrow = static_cast<const uint16_t*>(weight);
    if (dtype == kFloat32)
        quantize_blocks<Encoder, float, as_is>(static_cast<const float*>(weight), thresholds, first, count, total,
                                               block_size, packed, absmax);
    else if (dtype == kBFloat16)
        quantize_blocks<Encoder, uint16_t, bf16_to_float>(narrow, thresholds, first, count, total, block_size, packed,
                                                          absmax);
    else
        quantize_blocks<Encoder, uint16_t, fp16_to_float>(narrow, thresholds, first, count, total, block_size, packed,
                                                          absmax);
}

}  // namespace
}  // namespace ladder
