// The product with few tokens, with AVX-512 F/BW/VL: 16 weights from a shift and a permute.
#include <immintrin.h>

#include "multiply.h"

namespace ladder {
namespace {

struct Unrounded {
    static __m512 round(__m512 values) { return values; }
};

struct ThroughBFloat16 {
    static __m512 round(__m512 values) {
        const __m512i bits = _mm512_castps_si512(values);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 is_number = _mm512_cmp_ps_mask(values, values, _CMP_ORD_Q);
        return _mm512_castsi512_ps(_mm512_mask_and_epi32(bits, is_number, sum, _mm512_set1_epi32(-0x10000)));
    }
};

struct ThroughFloat16 {
    static __m512 round(__m512 values) {
        return _mm512_cvtph_ps(_mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
};

template <typename Rounding>
struct Avx512Kernel {
    static constexpr int kTokens = 8;
    // Sums, a table and indices per row, and one vector of x, in 32 registers.
    static constexpr int rows(int tokens) { return tokens <= 4 ? 4 : 2; }

    template <int kRows, int kTile>
    static void tile(const NF4View& view, const Product& product, int64_t row, int64_t token) {
        const int64_t groups = product.cols / kGroup;
        const float* x = static_cast<const float*>(product.arranged) + token * product.cols;
        const __m512 codebook = _mm512_loadu_ps(view.codebook);
        const __m512i upper_half = _mm512_set_epi64(16 * kTwice, 16 * kTwice, 16 * kTwice, 16 * kTwice, 0, 0, 0, 0);
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
            __m512 tables[kRows];
            __m512i indices[kRows];
            for (int r = 0; r < kRows; ++r) {
                const uint8_t* packed = view.packed + ((row + r) * groups + group) * (kGroup / 2);
                const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
                prefetch(packed, ahead);
                tables[r] = Rounding::round(_mm512_mul_ps(codebook, _mm512_set1_ps(scales[r * run + in_run])));
                // The words twice, the second copy four nibbles ahead.
                indices[r] = _mm512_srlv_epi32(_mm512_broadcast_i64x4(words), upper_half);
            }
            for (int i = 0; i < 4; ++i) {
                __m512 weights[kRows];
                for (int r = 0; r < kRows; ++r) {
                    weights[r] = _mm512_permutexvar_ps(indices[r], tables[r]);  // looks at four bits
                    indices[r] = _mm512_srli_epi32(indices[r], 4);
                }
                for (int t = 0; t < kTile; ++t) {
                    const __m512 values = _mm512_loadu_ps(x + t * product.cols + group * kGroup + 16 * i);
                    for (int r = 0; r < kRows; ++r) sums[r][t] = _mm512_fmadd_ps(weights[r], values, sums[r][t]);
                }
            }
        }
        for (int r = 0; r < kRows; ++r)
            for (int t = 0; t < kTile; ++t) finish(product, token + t, row + r, _mm512_reduce_add_ps(sums[r][t]));
    }

    static constexpr int64_t kTwice = (int64_t{1} << 32) + 1;  // a number into both halves of a 64-bit lane
};

}  // namespace

void multiply_avx512(const NF4View& view, const Product& product, int64_t first_row, int64_t end_row) {
    switch (product.dtype) {
        case kFloat32:
            return multiply_rows<Avx512Kernel<Unrounded>>(view, product, first_row, end_row);
        case kBFloat16:
            return multiply_rows<Avx512Kernel<ThroughBFloat16>>(view, product, first_row, end_row);
        default:
            return multiply_rows<Avx512Kernel<ThroughFloat16>>(view, product, first_row, end_row);
    }
}

}  // namespace ladder
