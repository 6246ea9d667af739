// The instructions of AVX512-BF16 and AMX-BF16 that the kernels use, or, with LADDER_EMULATE_BF16_UNITS, what they
// compute, written with AVX-512: so that their paths can be tested on machines without the units. Internal linkage.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "floats.h"

namespace ladder {
namespace {

constexpr int kTileRows = 16;       // rows of a tile register, of 64 bytes each
constexpr int kTileRowBytes = 64;

#ifndef LADDER_EMULATE_BF16_UNITS

#ifdef __AVX512BF16__
// sums[i] + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]; subnormal inputs count as zero.
inline __m512 dot_bf16_pairs(__m512 sums, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b);
}

inline __m256i to_bf16(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }
#endif

#ifdef __AMX_BF16__
// Tile registers are named by literals only.
#define LADDER_TILE_CONFIGURE(config) _tile_loadconfig(config)
#define LADDER_TILE_CONFIGURATION(config) _tile_storeconfig(config)
#define LADDER_TILE_ZERO(tile) _tile_zero(tile)
#define LADDER_TILE_LOAD(tile, base) _tile_loadd(tile, base, 64)
#define LADDER_TILE_STORE(tile, base) _tile_stored(tile, base, 64)
// c[m][n] += sum over pairs p of a[m][2p] * b[p][2n] + a[m][2p + 1] * b[p][2n + 1]
#define LADDER_TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)
#endif

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

thread_local uint8_t emulated_tiles[8][kTileRows * kTileRowBytes];

inline void emulate_tile_dot(int c, int a, int b) {
    float sums[kTileRows][16];
    uint16_t left[kTileRows][32], right[kTileRows][32];
    std::memcpy(sums, emulated_tiles[c], sizeof sums);
    std::memcpy(left, emulated_tiles[a], sizeof left);
    std::memcpy(right, emulated_tiles[b], sizeof right);
    for (int m = 0; m < kTileRows; ++m)
        for (int p = 0; p < 16; ++p)
            for (int n = 0; n < 16; ++n)
                sums[m][n] += bf16_to_float(left[m][2 * p]) * bf16_to_float(right[p][2 * n]) +
                              bf16_to_float(left[m][2 * p + 1]) * bf16_to_float(right[p][2 * n + 1]);
    std::memcpy(emulated_tiles[c], sums, sizeof sums);
}

#define LADDER_TILE_CONFIGURE(config) static_cast<void>(config)
#define LADDER_TILE_CONFIGURATION(config) static_cast<void>(config)
#define LADDER_TILE_ZERO(tile) std::memset(emulated_tiles[tile], 0, sizeof emulated_tiles[tile])
#define LADDER_TILE_LOAD(tile, base) std::memcpy(emulated_tiles[tile], base, sizeof emulated_tiles[tile])
#define LADDER_TILE_STORE(tile, base) std::memcpy(base, emulated_tiles[tile], sizeof emulated_tiles[tile])
#define LADDER_TILE_DOT(c, a, b) emulate_tile_dot(c, a, b)

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
