// What the paths of AVX512-BF16 and AMX share. With LADDER_EMULATE_BF16_UNITS the instructions of the units are computed
// with AVX-512, so that their paths can be tested on machines without them. Internal linkage (see scales.h).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "floats.h"

namespace ladder {
namespace {

#ifndef LADDER_EMULATE_BF16_UNITS

// sums[i] + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]; subnormal inputs count as zero.
inline __m512 dot_bf16_pairs(__m512 sums, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b);
}

inline __m256i to_bf16(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

#else

inline __m512 dot_bf16_pairs(__m512 sums, __m512i a, __m512i b) {
    const __m512i upper = _mm512_set1_epi32(-0x10000);
    const __m512 odd_a = _mm512_castsi512_ps(_mm512_and_si512(a, upper));
    const __m512 odd_b = _mm512_castsi512_ps(_mm512_and_si512(b, upper));
    const __m512 even_a = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16));
    const __m512 even_b = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
    return _mm512_fmadd_ps(even_a, even_b, _mm512_fmadd_ps(odd_a, odd_b, sums));
}

inline __m256i to_bf16(__m512 values) {
    alignas(64) float wide[16];
    alignas(32) uint16_t narrow[16];
    _mm512_store_ps(wide, values);
    for (int i = 0; i < 16; ++i) narrow[i] = float_to_bf16(wide[i]);
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(narrow));
}

#endif

// Two copies of the codebook times the scale, rounded to bf16: a 16-bit permute looks at five bits of an index, and with
// two copies the fifth does not matter.
inline __m512i bf16_table(__m512 codebook, float scale) {
    return _mm512_broadcast_i64x4(to_bf16(_mm512_mul_ps(codebook, _mm512_set1_ps(scale))));
}

// Indices of a group of 64 weights, read as sixteen 16-bit words: nibble 0 of all words in the lower half, nibble 2 in
// the upper half. Shifted by four bits, nibbles 1 and 3.
inline __m512i bf16_indices(const uint8_t* packed) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(8), 1);
    return _mm512_srlv_epi16(_mm512_broadcast_i64x4(words), shifts);
}

// Which element of a group of 64 the kernels meet in 16-bit lane `lane` of vector `step`: see multiply.h.
inline int bf16_order(int step, int lane) {
    const int nibble = step + (lane < 16 ? 0 : 2);
    return 4 * (lane % 16) + (nibble ^ 1);
}

}  // namespace
}  // namespace ladder
