// The product with few tokens, with AVX2, FMA and F16C: 8 weights from two permutes and a blend.
#include "multiply.h"
#include "rounding_avx2.h"

namespace ladder {
namespace {

inline float sum_lanes(__m256 values) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

template <typename Rounding>
struct Avx2Kernel {
    static constexpr int kTokens = 4;
    static constexpr int rows(int) { return 1; }

    template <int kRows, int kTile>
    static void tile(const NF4View& view, const Product& product, int64_t row, int64_t token) {
        static_assert(kRows == 1, "16 registers leave no room for a second row");
        const int64_t groups = product.cols / kGroup;
        const float* x = static_cast<const float*>(product.arranged) + token * product.cols;
        const __m256 small_codes = _mm256_loadu_ps(view.codebook), large_codes = _mm256_loadu_ps(view.codebook + 8);
        __m256 sums[kTile];
        for (int t = 0; t < kTile; ++t) sums[t] = _mm256_setzero_ps();
        float scales[kScaleRun];
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t in_run = group % kScaleRun;
            if (in_run == 0) {
                const int64_t left = groups - group;
                group_scales(view, row * groups + group, left < kScaleRun ? left : kScaleRun, scales);
            }
            const __m256 scale = _mm256_set1_ps(scales[in_run]);
            const __m256 small = Rounding::round(_mm256_mul_ps(small_codes, scale));
            const __m256 large = Rounding::round(_mm256_mul_ps(large_codes, scale));
            const uint8_t* packed = view.packed + (row * groups + group) * (kGroup / 2);
            const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
            for (int i = 0; i < 8; ++i) {
                // Nibbles 0, 4, 1, 5, 2, 6, 3, 7: the order of arrange_floats. A permute looks at three bits; the
                // fourth, moved to the sign, picks between the two.
                const __m256i index = _mm256_srlv_epi32(words, _mm256_set1_epi32(4 * (i / 2 + 4 * (i % 2))));
                const __m256 pick = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
                const __m256 weights = _mm256_blendv_ps(_mm256_permutevar8x32_ps(small, index),
                                                        _mm256_permutevar8x32_ps(large, index), pick);
                for (int t = 0; t < kTile; ++t) {
                    const float* values = x + (group * kTile * 4 + i / 2 * kTile + t) * 16 + i % 2 * 8;
                    sums[t] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(values), sums[t]);
                }
            }
        }
        for (int t = 0; t < kTile; ++t) finish(product, token + t, row, sum_lanes(sums[t]));
    }
};

}  // namespace

void arrange_avx2(const Product& product) { arrange_floats<Avx2Kernel<Unrounded>::kTokens>(product); }

void multiply_avx2(const NF4View& view, const Product& product, int64_t first_row, int64_t end_row) {
    multiply_any<Avx2Kernel<Unrounded>, Avx2Kernel<ThroughBFloat16>, Avx2Kernel<ThroughFloat16>>(view, product,
                                                                                                 first_row, end_row);
}

}  // namespace ladder
