// NF4 decode with AVX-512 F/BW/VL: one permute of the block's table yields 16 fp32 or 32 16-bit weights.
#include <immintrin.h>

#include "dequantize.h"

namespace ladder {
namespace {

struct Decode32 {
    static void fill(const float* codebook, float scale, float* table) {
        _mm512_store_ps(table, _mm512_mul_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(scale)));
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
        for (; i < pairs; ++i) {
            out[2 * i] = table[bytes[i] >> 4];
            out[2 * i + 1] = table[bytes[i] & 15];
        }
    }
};

struct BFloat16Rounding {
    static __m256i round(__m512 values) {
        const __m512i bits = _mm512_castps_si512(values);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
        const __m512i rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), is_nan, _mm512_set1_epi32(0x7fc0));
        return _mm512_cvtepi32_epi16(rounded);
    }
};

struct Float16Rounding {
    static __m256i round(__m512 values) {
        return _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
};

template <typename Rounding>
struct Decode16 {
    static void fill(const float* codebook, float scale, uint16_t* table) {
        const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(scale));
        _mm256_store_si256(reinterpret_cast<__m256i*>(table), Rounding::round(values));
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
        for (; i < pairs; ++i) {
            out[2 * i] = table[bytes[i] >> 4];
            out[2 * i + 1] = table[bytes[i] & 15];
        }
    }
};

}  // namespace

void dequantize_avx512(const NF4View& view, int64_t first, int64_t count, int32_t dtype, void* out) {
    switch (dtype) {
        case kFloat32:
            return dequantize_blocks<Decode32>(view, first, count, static_cast<float*>(out));
        case kBFloat16:
            return dequantize_blocks<Decode16<BFloat16Rounding>>(view, first, count, static_cast<uint16_t*>(out));
        default:
            return dequantize_blocks<Decode16<Float16Rounding>>(view, first, count, static_cast<uint16_t*>(out));
    }
}

}  // namespace ladder
