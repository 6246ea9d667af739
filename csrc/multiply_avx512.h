// The tile of the AVX-512 and the AVX512-BF16 product with few tokens. Internal linkage (see scales.h).
#pragma once

#include <immintrin.h>

#include "multiply.h"

namespace ladder {
namespace {

// What differs between the two is in `Lanes`: the arranged type of x, how many vectors a group of 64 weights takes, the
// table that a permute looks weights up in, the indices of a group (four bits each, the next ones four bits further) and
// the multiply-add.
template <typename Lanes>
struct Avx512Kernel {
    static constexpr int kTokens = 8;
    // Sums, a table and indices per row, and one vector of x, in 32 registers.
    static constexpr int rows(int tokens) { return tokens <= 4 ? 4 : 2; }

    template <int kRows, int kTile>
    static void tile(const NF4View& view, const Product& product, int64_t row, int64_t token) {
        const int64_t groups = product.cols / kGroup;
        const auto* x = static_cast<const typename Lanes::X*>(product.arranged) + token * product.cols;
        const __m512 codebook = _mm512_loadu_ps(view.codebook);
        __m512 sums[kRows][kTile];
        for (int r = 0; r < kRows; ++r)
            for (int t = 0; t < kTile; ++t) sums[r][t] = _mm512_setzero_ps();
        float scales[kRows * kScaleRun];
        const int64_t ahead = prefetch_distance(kRows, groups);
        int64_t run = 0;
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t in_run = group % kScaleRun;
            if (in_run == 0) {
                run = groups - group < kScaleRun ? groups - group : kScaleRun;
                row_scales(view, row, kRows, groups, group, run, scales);
            }
            typename Lanes::Table tables[kRows];
            __m512i indices[kRows];
            for (int r = 0; r < kRows; ++r) {
                const uint8_t* packed = view.packed + ((row + r) * groups + group) * (kGroup / 2);
                prefetch(packed, ahead);
                tables[r] = Lanes::table(codebook, scales[r * run + in_run]);
                indices[r] = Lanes::indices(packed);
            }
            for (int step = 0; step < Lanes::kSteps; ++step) {
                typename Lanes::Table weights[kRows];
                for (int r = 0; r < kRows; ++r) {
                    weights[r] = Lanes::look_up(indices[r], tables[r]);
                    indices[r] = Lanes::next(indices[r]);
                }
                for (int t = 0; t < kTile; ++t) {
                    const auto values = Lanes::load(x + (group * kTile * Lanes::kSteps + step * kTile + t) * (kGroup / Lanes::kSteps));
                    for (int r = 0; r < kRows; ++r) sums[r][t] = Lanes::multiply_add(weights[r], values, sums[r][t]);
                }
            }
        }
        for (int r = 0; r < kRows; ++r)
            for (int t = 0; t < kTile; ++t) finish(product, token + t, row + r, _mm512_reduce_add_ps(sums[r][t]));
    }
};

}  // namespace
}  // namespace ladder
