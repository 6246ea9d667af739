// The block walk shared by the scalar and the vector decoders, with internal linkage (see scales.h).
#pragma once

#include "kernels.h"
#include "scales.h"

namespace ladder {
namespace {

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

}  // namespace
}  // namespace ladder
