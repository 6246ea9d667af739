// NF4 encode with AVX-512 F/BW/VL: a binary search of the thresholds, 16 values at a time, in four permutes.
#include <immintrin.h>

#include "quantize.h"

namespace ladder {
namespace {

struct SearchThresholds {
    static void pack(const float* values, int64_t size, const float* thresholds, uint8_t* packed) {
        const __m512 table = _mm512_maskz_loadu_ps(0x7fff, thresholds);  // the 16th is never looked at
        int64_t i = 0;
        for (; i + 16 <= size; i += 16) {
            const __m512 v = _mm512_loadu_ps(values + i);
            __m512i code = _mm512_setzero_si512();
            for (int step = 8; step > 0; step /= 2) {
                const __m512i middle = _mm512_add_epi32(code, _mm512_set1_epi32(step - 1));
                // Not "below or equal": a NaN is above every threshold.
                const __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(middle, table), _CMP_NLE_UQ);
                code = _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(step));
            }
            // In each 64-bit lane the even element is the low half, and its code the high nibble.
            const __m512i bytes = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(packed + i / 2), _mm512_cvtepi64_epi8(bytes));
        }
        CountThresholds::pack(values + i, size - i, thresholds, packed + i / 2);
    }
};

}  // namespace

void quantize_avx512(const void* weight, int32_t dtype, const float* thresholds, int64_t first, int64_t count,
                     int64_t total, int64_t block_size, uint8_t* packed, float* absmax) {
    quantize_any<SearchThresholds>(weight, dtype, thresholds, first, count, total, block_size, packed, absmax);
}

}  // namespace ladder
