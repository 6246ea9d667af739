// The product of bf16 with few tokens, with AVX512-BF16: 32 weights from a shift and a permute, pairs multiplied at once.
#include "bf16_units.h"
#include "multiply.h"

namespace ladder {
namespace {

struct Avx512Bf16Kernel {
    static constexpr int kTokens = 8;
    static constexpr int rows(int tokens) { return tokens <= 4 ? 4 : 2; }

    template <int kRows, int kTile>
    static void tile(const NF4View& view, const Product& product, int64_t row, int64_t token) {
        const int64_t groups = product.cols / kGroup;
        const uint16_t* x = static_cast<const uint16_t*>(product.arranged) + token * product.cols;
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
            __m512i tables[kRows], indices[kRows];
            for (int r = 0; r < kRows; ++r) {
                const uint8_t* packed = view.packed + ((row + r) * groups + group) * (kGroup / 2);
                prefetch(packed, ahead);
                tables[r] = bf16_table(codebook, scales[r * run + in_run]);
                indices[r] = bf16_indices(packed);
            }
            for (int step = 0; step < 2; ++step) {
                __m512i weights[kRows];
                for (int r = 0; r < kRows; ++r) {
                    weights[r] = _mm512_permutexvar_epi16(indices[r], tables[r]);
                    indices[r] = _mm512_srli_epi16(indices[r], 4);
                }
                for (int t = 0; t < kTile; ++t) {
                    const __m512i values = _mm512_loadu_si512(x + t * product.cols + group * kGroup + 32 * step);
                    for (int r = 0; r < kRows; ++r) sums[r][t] = dot_bf16_pairs(sums[r][t], weights[r], values);
                }
            }
        }
        for (int r = 0; r < kRows; ++r)
            for (int t = 0; t < kTile; ++t) finish(product, token + t, row + r, _mm512_reduce_add_ps(sums[r][t]));
    }
};

}  // namespace

void arrange_avx512bf16(const Product& product) {
    if (product.dtype != kBFloat16) return arrange_vector(product);
    const uint16_t* x = static_cast<const uint16_t*>(product.x);
    uint16_t* arranged = static_cast<uint16_t*>(product.arranged);
    for (int64_t group = 0; group < product.tokens * product.cols; group += kGroup)
        for (int i = 0; i < kGroup; ++i) arranged[group + i] = x[group + bf16_order(i / 32, i % 32)];
}

void multiply_avx512bf16(const NF4View& view, const Product& product, int64_t first_row, int64_t end_row) {
    if (product.dtype != kBFloat16) return multiply_avx512(view, product, first_row, end_row);
    multiply_rows<Avx512Bf16Kernel>(view, product, first_row, end_row);
}

}  // namespace ladder
