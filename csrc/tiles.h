// The tile registers of AMX-BF16: eight, each of 16 rows of 64 bytes, named by literals only. Or, with
// LADDER_EMULATE_BF16_UNITS, memory that behaves like them. Internal linkage (see scales.h).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "floats.h"

namespace ladder {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;

#ifndef LADDER_EMULATE_BF16_UNITS

// Tile registers are named by literals only.
#define LADDER_TILE_CONFIGURE(config) _tile_loadconfig(config)
#define LADDER_TILE_CONFIGURATION(config) _tile_storeconfig(config)
#define LADDER_TILE_ZERO(tile) _tile_zero(tile)
#define LADDER_TILE_LOAD(tile, base) _tile_loadd(tile, base, 64)
#define LADDER_TILE_STORE(tile, base) _tile_stored(tile, base, 64)
// c[m][n] += sum over pairs p of a[m][2p] * b[p][2n] + a[m][2p + 1] * b[p][2n + 1]
#define LADDER_TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)

#else

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

}  // namespace
}  // namespace ladder
