// fp32 <-> bf16 and fp16 by bit patterns: round to nearest even, NaN stays NaN, overflow becomes infinity.
// Internal linkage: each instruction set's file keeps its own copy, compiled with its own flags.
#pragma once

#include <cstdint>
#include <cstring>

namespace ladder {
namespace {

inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float bits_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline uint16_t float_to_fp16(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 2^16 and above
    if (magnitude < 0x38800000u) {
        // Below 2^-14 fp16 is a multiple of 2^-24: adding 0.5, whose last bit is 2^-24, rounds to one.
        const uint32_t sum = float_bits(bits_float(magnitude) + 0.5f);
        return static_cast<uint16_t>(sign | (sum - 0x3f000000u));
    }
    // Rounding up from the largest mantissa carries into the exponent, and from 65520 on into infinity.
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline float as_is(float value) { return value; }

inline float bf16_to_float(uint16_t value) { return bits_float(static_cast<uint32_t>(value) << 16); }

inline float fp16_to_float(uint16_t value) {
    const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
    const uint32_t magnitude = value & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude << 13));
    if (magnitude >= 0x0400u) return bits_float(sign | ((magnitude << 13) + 0x38000000u));
    // Subnormal: the integer magnitude times 2^-24, exact in fp32.
    return bits_float(sign | float_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 5.9604644775390625e-8f));
}

inline float through_bf16(float value) { return bf16_to_float(float_to_bf16(value)); }
inline float through_fp16(float value) { return fp16_to_float(float_to_fp16(value)); }

}  // namespace
}  // namespace ladder
