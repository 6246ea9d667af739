// The block walk shared by the scalar and the vector decoders, with internal linkage (see scales.h).
#pragma once

#include "kernels.h"
#include "scales.h"

namespace ladder {
namespace {

// out[2 * first .. 2 * pairs) from bytes[first .. pairs): what vectors leave over, or all of it.
template <typename Out>
void look_up_pairs(const uint8_t* bytes, const Out* table, int64_t first, int64_t pairs, Out* out) {
    for (int64_t i = first; i < pairs; ++i) {
        out[2 * i] = table[bytes[i] >> 4];
        out[2 * i + 1] = table[bytes[i] & 15];
    }
}

// A block has 16 possible values, so they are scaled and rounded once per block; what remains per element is a lookup.
// `Decode::fill(codebook, scale, table)` makes the table, `Decode::run(bytes, table, pairs, out)` writes
// out[0 .. 2 * pairs) from `pairs` bytes.
template <typename Decode, typename Out>
void dequantize_blocks(const NF4View& view, int64_t first, int64_t count, Out* out) {
    const int64_t end = first + count;
    int64_t block = first / view.block_size;
    for (int64_t begin = first; begin < end; ++block) {
        const int64_t block_end = (block + 1) * view.block_size;
        const int64_t stop = block_end < end ? block_end : end;

        alignas(64) Out table[16];
        Decode::fill(view.codebook, block_scale(view, block), table);

        int64_t element = begin;
        if (element & 1) {
            *out++ = table[view.packed[element / 2] & 15];
            ++element;
        }
        const int64_t pairs = (stop - element) / 2;
        Decode::run(view.packed + element / 2, table, pairs, out);
        out += 2 * pairs;
        element += 2 * pairs;
        if (element < stop) *out++ = table[view.packed[element / 2] >> 4];
        begin = stop;
    }
}

// The decoder of a rounding and the type it is kept in.
template <typename Float32, typename BFloat16, typename Float16, typename BFloat16InFloat32, typename Float16InFloat32>
void dequantize_any(const NF4View& view, int64_t first, int64_t count, int32_t decoded, void* out) {
    float* wide = static_cast<float*>(out);
    uint16_t* narrow = static_cast<uint16_t*>(out);
    switch (decoded) {
        case kFloat32:
            return dequantize_blocks<Float32>(view, first, count, wide);
        case kBFloat16:
            return dequantize_blocks<BFloat16>(view, first, count, narrow);
        case kFloat16:
            return dequantize_blocks<Float16>(view, first, count, narrow);
        case kBFloat16InFloat32:
            return dequantize_blocks<BFloat16InFloat32>(view, first, count, wide);
        default:
            return dequantize_blocks<Float16InFloat32>(view, first, count, wide);
    }
}

}  // namespace
}  // namespace ladder
