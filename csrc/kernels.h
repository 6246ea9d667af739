// The kernels behind the C ABI of api.cpp. Every instruction set implements the same functions, bit for bit.
#pragma once

#include <cstdint>

namespace ladder {

// An NF4 matrix, flattened. Element e has the code in packed[e / 2]: high nibble if e is even, else low nibble.
// Its scale is absmax[b] with b = e / block_size, or, with double quantization,
// absmax_map[absmax_code[b]] * absmax_scale[b / 256] + *absmax_offset, the product rounded before the sum.
struct NF4View {
    const uint8_t* packed;
    const float* codebook;       // 16 values
    const float* absmax;         // null with double quantization
    const uint8_t* absmax_code;  // null without
    const float* absmax_scale;
    const float* absmax_map;     // 256 values
    const float* absmax_offset;  // 1 value
    int64_t block_size;          // even
};

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Decode elements [first, first + count) to out[0 .. count): codebook value times scale in fp32, rounded once.
using DequantizeFn = void (*)(const NF4View& view, int64_t first, int64_t count, int32_t dtype, void* out);

// Encode elements [first, first + count), where first is a multiple of block_size. `total` is the size of the whole
// matrix: its last block, if partial, divides by absmax where full blocks multiply by the reciprocal.
using QuantizeFn = void (*)(const void* weight, int32_t dtype, const float* thresholds, int64_t first, int64_t count,
                            int64_t total, int64_t block_size, uint8_t* packed, float* absmax);

void dequantize_scalar(const NF4View& view, int64_t first, int64_t count, int32_t dtype, void* out);
void quantize_scalar(const void* weight, int32_t dtype, const float* thresholds, int64_t first, int64_t count,
                     int64_t total, int64_t block_size, uint8_t* packed, float* absmax);
#ifdef LADDER_HAS_AVX512
void dequantize_avx512(const NF4View& view, int64_t first, int64_t count, int32_t dtype, void* out);
void quantize_avx512(const void* weight, int32_t dtype, const float* thresholds, int64_t first, int64_t count,
                     int64_t total, int64_t block_size, uint8_t* packed, float* absmax);
#endif

}  // namespace ladder
