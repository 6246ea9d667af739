// The product of bf16 with few tokens, with AVX512-BF16: 32 weights from a shift and a permute, pairs multiplied at once.
#include "bf16_units.h"
#include "multiply_avx512.h"

namespace ladder {
namespace {

struct BFloat16Lanes {
    using X = uint16_t;
    using Table = __m512i;
    static constexpr int kSteps = 2;

    static __m512i table(__m512 codebook, float scale) { return bf16_table(codebook, scale); }
    static __m512i indices(const uint8_t* packed) { return bf16_indices(packed); }
    static __m512i look_up(__m512i indices, __m512i table) { return _mm512_permutexvar_epi16(indices, table); }
    static __m512i next(__m512i indices) { return _mm512_srli_epi16(indices, 4); }
    static __m512i load(const uint16_t* x) { return _mm512_loadu_si512(x); }
    static __m512 multiply_add(__m512i weights, __m512i values, __m512 sums) {
        return dot_bf16_pairs(sums, weights, values);
    }
};

}  // namespace

void arrange_avx512bf16(const Product& product) {
    if (product.dtype != kBFloat16) return arrange_avx512(product);
    const uint16_t* x = static_cast<const uint16_t*>(product.x);
    uint16_t* target = static_cast<uint16_t*>(product.arranged);
    for (int64_t first = 0, tile = 0; first < product.tokens; first += tile) {
        tile = tile_tokens(product.tokens - first, Avx512Kernel<BFloat16Lanes>::kTokens);
        for (int64_t group = 0; group < product.cols; group += kGroup)
            for (int step = 0; step < 2; ++step)
                for (int64_t token = first; token < first + tile; ++token)
                    for (int lane = 0; lane < 32; ++lane)
                        *target++ = x[token * product.cols + group + bf16_order(step, lane)];
    }
}

void multiply_avx512bf16(const NF4View& view, const Product& product, int64_t first_row, int64_t end_row) {
    if (product.dtype != kBFloat16) return multiply_avx512(view, product, first_row, end_row);
    multiply_rows<Avx512Kernel<BFloat16Lanes>>(view, product, first_row, end_row);
}

}  // namespace ladder
