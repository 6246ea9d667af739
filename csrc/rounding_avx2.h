// How a decoded weight is rounded, 8 at a time: `round` keeps it in fp32, `narrow` returns the 16-bit lanes of two
// vectors. Internal linkage (see scales.h).
#pragma once

#include <immintrin.h>

namespace ladder {
namespace {

struct Unrounded {
    static __m256 round(__m256 values) { return values; }
};

struct ThroughBFloat16 {
    static __m256 round(__m256 values) {
        const __m256i bits = _mm256_castps_si256(values);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256 rounded = _mm256_castsi256_ps(_mm256_and_si256(sum, _mm256_set1_epi32(-0x10000)));
        return _mm256_blendv_ps(rounded, values, _mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    }

    // A NaN that comes out of arithmetic is a quiet one: its upper half is a NaN too.
    static __m256i narrow(__m256 first, __m256 second) {
        const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(_mm256_castps_si256(round(first)), 16),
                                                   _mm256_srli_epi32(_mm256_castps_si256(round(second)), 16));
        return _mm256_permute4x64_epi64(packed, 0xd8);  // the pack works within 128-bit lanes
    }
};

struct ThroughFloat16 {
    static constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

    static __m256 round(__m256 values) { return _mm256_cvtph_ps(_mm256_cvtps_ph(values, kNearest)); }

    static __m256i narrow(__m256 first, __m256 second) {
        return _mm256_set_m128i(_mm256_cvtps_ph(second, kNearest), _mm256_cvtps_ph(first, kNearest));
    }
};

}  // namespace
}  // namespace ladder
