// NF4 decode with AVX-512 F/BW/VL: one permute of the block's table yields 16 fp32 or 32 16-bit weights.
#include "dequantize.h"
#include "rounding_avx512.h"

namespace ladder {
namespace {

template <typename Rounding>
struct Decode32 {
    static void fill(const float* codebook, float scale, float* table) {
        _mm512_store_ps(table, Rounding::round(_mm512_mul_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(scale))));
    }

    static void run(const uint8_t* bytes, const float* table, int64_t pairs, float* out) {
        const __m512 values = _mm512_load_ps(table);
        int64_t i = 0;
        for (; i + 8 <= pairs; i += 8) {
            // Each byte in a 64-bit lane: its high nibble to the low dword, the byte itself to the high dword. The
            // permute looks at the low four bits of a dword only.
            const __m512i b = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + i)));
            const __m512i index = _mm512_or_si512(_mm512_srli_epi64(b, 4), _mm512_slli_epi64(b, 32));
            _mm512_storeu_ps(out + 2 * i, _mm512_permutexvar_ps(index, values));
        }
        look_up_pairs(bytes, table, i, pairs, out);
    }
};

template <typename Rounding>
struct Decode16 {
    static void fill(const float* codebook, float scale, uint16_t* table) {
        const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(scale));
        _mm256_store_si256(reinterpret_cast<__m256i*>(table), Rounding::narrow(values));
    }

    static void run(const uint8_t* bytes, const uint16_t* table, int64_t pairs, uint16_t* out) {
        // The 16-bit permute looks at five bits: with the table twice in the register, the fifth does not matter.
        const __m512i values = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(table)));
        int64_t i = 0;
        for (; i + 16 <= pairs; i += 16) {
            const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i)));
            const __m512i index = _mm512_or_si512(_mm512_srli_epi32(b, 4), _mm512_slli_epi32(b, 16));
            _mm512_storeu_si512(out + 2 * i, _mm512_permutexvar_epi16(index, values));
        }
        look_up_pairs(bytes, table, i, pairs, out);
    }
};

}  // namespace

void dequantize_avx512(const NF4View& view, int64_t first, int64_t count, int32_t decoded, void* out) {
    dequantize_any<Decode32<Unrounded>, Decode16<ThroughBFloat16>, Decode16<ThroughFloat16>, Decode32<ThroughBFloat16>,
                   Decode32<ThroughFloat16>>(view, first, count, decoded, out);
}

}  // namespace ladder
