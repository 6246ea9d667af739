// The product with few tokens, with AVX-512 F/BW/VL: 16 weights from a shift and a permute.
#include "multiply_avx512.h"
#include "rounding_avx512.h"

namespace ladder {
namespace {

template <typename Rounding>
struct Float32Lanes {
    using X = float;
    using Table = __m512;
    static constexpr int kSteps = 4;

    static __m512 table(__m512 codebook, float scale) {
        return Rounding::round(_mm512_mul_ps(codebook, _mm512_set1_ps(scale)));
    }

    // Eight 32-bit words twice, the second copy four nibbles ahead.
    static __m512i indices(const uint8_t* packed) {
        constexpr int64_t kTwice = (int64_t{1} << 32) + 1;  // a number into both halves of a 64-bit lane
        const __m512i upper_half = _mm512_set_epi64(16 * kTwice, 16 * kTwice, 16 * kTwice, 16 * kTwice, 0, 0, 0, 0);
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
        return _mm512_srlv_epi32(_mm512_broadcast_i64x4(words), upper_half);
    }

    static __m512 look_up(__m512i indices, __m512 table) { return _mm512_permutexvar_ps(indices, table); }
    static __m512i next(__m512i indices) { return _mm512_srli_epi32(indices, 4); }
    static __m512 load(const float* x) { return _mm512_loadu_ps(x); }
    static __m512 multiply_add(__m512 weights, __m512 values, __m512 sums) {
        return _mm512_fmadd_ps(weights, values, sums);
    }
};

template <typename Rounding>
using Kernel = Avx512Kernel<Float32Lanes<Rounding>>;

}  // namespace

void arrange_avx512(const Product& product) { arrange_floats<Kernel<Unrounded>::kTokens>(product); }

void multiply_avx512(const NF4View& view, const Product& product, int64_t first_row, int64_t end_row) {
    multiply_any<Kernel<Unrounded>, Kernel<ThroughBFloat16>, Kernel<ThroughFloat16>>(view, product, first_row, end_row);
}

}  // namespace ladder
