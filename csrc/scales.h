// Block scales of an NF4 matrix. All of it has internal linkage: were the linker to merge the copies of two files, code
// for AVX-512 could end up in the scalar path.
#pragma once

#include "kernels.h"

namespace ladder {
namespace {

constexpr int64_t kScaleBlock = 256;  // scales per block of double quantization

inline float block_scale(const NF4View& view, int64_t block) {
    if (view.absmax_map == nullptr) return static_cast<const float*>(view.absmax)[block];
    const uint8_t code = static_cast<const uint8_t*>(view.absmax)[block];
    const float product = view.absmax_map[code] * view.absmax_scale[block / kScaleBlock];
    return product + *view.absmax_offset;
}

// Scales of `count` groups of 64 elements from group `first` on, where block_size is a multiple of 64.
inline void group_scales(const NF4View& view, int64_t first, int64_t count, float* scales) {
    const int64_t groups_per_block = view.block_size / 64;
    if (groups_per_block > 1) {
        // One division, not one for each group: it takes as long as the products of a group.
        int64_t block = first / groups_per_block;
        for (int64_t i = 0; i < count; ++block) {
            const int64_t block_end = (block + 1) * groups_per_block - first;
            const int64_t stop = block_end < count ? block_end : count;
            const float scale = block_scale(view, block);
            for (; i < stop; ++i) scales[i] = scale;
        }
        return;
    }
    if (view.absmax_map == nullptr) {
        const float* absmax = static_cast<const float*>(view.absmax) + first;
        for (int64_t i = 0; i < count; ++i) scales[i] = absmax[i];
        return;
    }
    // Looked up one by one and then scaled as vectors. (A gather is no faster, and where a processor needs the fix for
    // Downfall it is several times slower.)
    const uint8_t* codes = static_cast<const uint8_t*>(view.absmax) + first;
    const float* map = view.absmax_map;
    for (int64_t i = 0; i < count; ++i) scales[i] = map[codes[i]];
    const float offset = *view.absmax_offset;
    for (int64_t i = 0; i < count;) {
        const int64_t run_end = (first + i) / kScaleBlock * kScaleBlock + kScaleBlock - first;
        const int64_t stop = run_end < count ? run_end : count;
        const float scale = view.absmax_scale[(first + i) / kScaleBlock];
        for (; i < stop; ++i) {
            const float product = scales[i] * scale;
            scales[i] = product + offset;
        }
    }
}

// Scales of `rows` rows of `groups` groups each, `run` of them from `group` on, at scales[row * run + i].
inline void row_scales(const NF4View& view, int64_t row, int64_t rows, int64_t groups, int64_t group, int64_t run,
                       float* scales) {
    if (run == groups) return group_scales(view, row * groups, rows * groups, scales);
    for (int64_t r = 0; r < rows; ++r) group_scales(view, (row + r) * groups + group, run, scales + r * run);
}

}  // namespace
}  // namespace ladder
