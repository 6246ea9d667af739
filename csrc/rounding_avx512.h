// How a decoded weight is rounded, 16 at a time: `round` keeps it in fp32, `narrow` returns 16-bit lanes. Internal
// linkage (see scales.h).
#pragma once

#include <immintrin.h>

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

    // A NaN that comes out of arithmetic is a quiet one: its upper half is a NaN too.
    static __m256i narrow(__m512 values) {
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(round(values)), 16));
    }
};

struct ThroughFloat16 {
    static __m512 round(__m512 values) { return _mm512_cvtph_ps(narrow(values)); }

    static __m256i narrow(__m512 values) {
        return _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
};

}  // namespace
}  // namespace ladder
