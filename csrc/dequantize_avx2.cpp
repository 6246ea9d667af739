// NF4 decode with AVX2: two permutes of half tables yield 8 fp32 weights, two byte shuffles 32 16-bit weights.
#include <cstring>

#include "dequantize.h"
#include "rounding_avx2.h"

namespace ladder {
namespace {

template <typename Rounding>
struct Decode32 {
    static void fill(const float* codebook, float scale, float* table) {
        const __m256 factor = _mm256_set1_ps(scale);
        _mm256_store_ps(table, Rounding::round(_mm256_mul_ps(_mm256_loadu_ps(codebook), factor)));
        _mm256_store_ps(table + 8, Rounding::round(_mm256_mul_ps(_mm256_loadu_ps(codebook + 8), factor)));
    }

    static void run(const uint8_t* bytes, const float* table, int64_t pairs, float* out) {
        const __m256 low = _mm256_load_ps(table), high = _mm256_load_ps(table + 8);
        const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
        int64_t i = 0;
        for (; i + 4 <= pairs; i += 4) {
            int32_t four;
            std::memcpy(&four, bytes + i, sizeof four);
            // The permutes look at three bits; the fourth, moved to the sign, picks between them.
            const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(four), shifts);
            const __m256 pick = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
            const __m256 small = _mm256_permutevar8x32_ps(low, index), large = _mm256_permutevar8x32_ps(high, index);
            _mm256_storeu_ps(out + 2 * i, _mm256_blendv_ps(small, large, pick));
        }
        look_up_pairs(bytes, table, i, pairs, out);
    }
};

template <typename Rounding>
struct Decode16 {
    static void fill(const float* codebook, float scale, uint16_t* table) {
        const __m256 factor = _mm256_set1_ps(scale);
        const __m256 first = _mm256_mul_ps(_mm256_loadu_ps(codebook), factor);
        const __m256 second = _mm256_mul_ps(_mm256_loadu_ps(codebook + 8), factor);
        _mm256_store_si256(reinterpret_cast<__m256i*>(table), Rounding::narrow(first, second));
    }

    static void run(const uint8_t* bytes, const uint16_t* table, int64_t pairs, uint16_t* out) {
        const __m256i values = _mm256_load_si256(reinterpret_cast<const __m256i*>(table));
        const __m256i low = byte_table(_mm256_and_si256(values, _mm256_set1_epi16(0xff)));
        const __m256i high = byte_table(_mm256_srli_epi16(values, 8));
        int64_t i = 0;
        for (; i + 16 <= pairs; i += 16) {
            // Each byte in a 16-bit lane: its high nibble to the low byte, its low nibble to the high byte.
            const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i)));
            const __m256i odd = _mm256_and_si256(_mm256_slli_epi16(b, 8), _mm256_set1_epi16(0x0f00));
            const __m256i index = _mm256_or_si256(_mm256_srli_epi16(b, 4), odd);
            const __m256i small = _mm256_shuffle_epi8(low, index), large = _mm256_shuffle_epi8(high, index);
            const __m256i first = _mm256_unpacklo_epi8(small, large), second = _mm256_unpackhi_epi8(small, large);
            __m256i* target = reinterpret_cast<__m256i*>(out + 2 * i);
            _mm256_storeu_si256(target, _mm256_permute2x128_si256(first, second, 0x20));
            _mm256_storeu_si256(target + 1, _mm256_permute2x128_si256(first, second, 0x31));
        }
        look_up_pairs(bytes, table, i, pairs, out);
    }

    // 16 bytes from 16-bit lanes, once in each half.
    static __m256i byte_table(__m256i lanes) {
        const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
        return _mm256_broadcastsi128_si256(bytes);
    }
};

}  // namespace

void dequantize_avx2(const NF4View& view, int64_t first, int64_t count, int32_t decoded, void* out) {
    dequantize_any<Decode32<Unrounded>, Decode16<ThroughBFloat16>, Decode16<ThroughFloat16>, Decode32<ThroughBFloat16>,
                   Decode32<ThroughFloat16>>(view, first, count, decoded, out);
}

}  // namespace ladder
