// The product of bf16 with few tokens, with AMX: 16 rows of W are decoded into a tile, which multiplies 16 tokens at once.
//
// W is the left operand, so that a decoded row is a row of the tile as it stands; x is the right one, pairs of its
// elements side by side, as arrange_amx lays it out: [16 tokens][group][step][pair][token][2].
#include <algorithm>

#include "bf16_units.h"
#include "multiply.h"
#include "tiles.h"

namespace ladder {
namespace {

// Up to here one register per token and row is as fast as a tile that is mostly padding.
constexpr int64_t kTokensWithoutTiles = 4;
constexpr int64_t kTileTokens = 16;
constexpr int64_t kTileBytes = kTileRows * kTileRowBytes;

bool uses_tiles(const Product& product) {
    return product.dtype == kBFloat16 && product.tokens > kTokensWithoutTiles;
}

// The format that the processor reads: eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    TileConfig() {
        std::fill_n(row_bytes, 8, static_cast<uint16_t>(kTileRowBytes));
        std::fill_n(rows, 8, static_cast<uint8_t>(kTileRows));
    }
};

// This thread's tile registers, given back as they were configured: torch's products use them too.
class TileScope {
   public:
    TileScope() {
        LADDER_TILE_CONFIGURATION(&before_);
        LADDER_TILE_CONFIGURE(&mine_);
    }
    ~TileScope() { LADDER_TILE_CONFIGURE(&before_); }
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;

   private:
    TileConfig before_, mine_;
};

// Both steps of one group of `rows` rows; rows beyond stay as they are.
void decode_group(const NF4View& view, int64_t row, int64_t rows, int64_t groups, int64_t group, const float* scales,
                  int64_t scale_stride, uint16_t (*decoded)[kTileRows][32]) {
    const __m512 codebook = _mm512_loadu_ps(view.codebook);
    for (int64_t r = 0; r < rows; ++r) {
        const __m512i table = bf16_table(codebook, scales[r * scale_stride]);
        const __m512i indices = bf16_indices(view.packed + ((row + r) * groups + group) * (kGroup / 2));
        _mm512_store_si512(decoded[0][r], _mm512_permutexvar_epi16(indices, table));
        _mm512_store_si512(decoded[1][r], _mm512_permutexvar_epi16(_mm512_srli_epi16(indices, 4), table));
    }
}

// Results of `rows` rows and of the 16 or 32 tokens from `token` on. The two steps have sums of their own, for a tile
// product takes about 50 cycles until its result can be added to.
void multiply_tile(const NF4View& view, const Product& product, int64_t row, int64_t rows, int64_t token) {
    const int64_t groups = product.cols / kGroup;
    const bool two = product.tokens - token > kTileTokens;
    const uint8_t* x = static_cast<const uint8_t*>(product.arranged) + token * product.cols * 2;
    const uint8_t* next_x = x + (two ? kTileTokens * product.cols * 2 : 0);
    alignas(64) uint16_t decoded[2][kTileRows][32] = {};
    float scales[kTileRows * kScaleRun];
    LADDER_TILE_ZERO(0);
    LADDER_TILE_ZERO(1);
    LADDER_TILE_ZERO(2);
    LADDER_TILE_ZERO(3);
    int64_t run = 0;
    for (int64_t group = 0; group < groups; ++group) {
        if (group % kScaleRun == 0) {
            run = std::min(groups - group, kScaleRun);
            row_scales(view, row, rows, groups, group, run, scales);
        }
        decode_group(view, row, rows, groups, group, scales + group % kScaleRun, run, decoded);
        LADDER_TILE_LOAD(4, decoded[0]);
        LADDER_TILE_LOAD(5, decoded[1]);
        LADDER_TILE_LOAD(6, x + 2 * group * kTileBytes);
        LADDER_TILE_LOAD(7, x + (2 * group + 1) * kTileBytes);
        LADDER_TILE_DOT(0, 4, 6);
        LADDER_TILE_DOT(1, 5, 7);
        if (two) {
            LADDER_TILE_LOAD(6, next_x + 2 * group * kTileBytes);
            LADDER_TILE_LOAD(7, next_x + (2 * group + 1) * kTileBytes);
            LADDER_TILE_DOT(2, 4, 6);
            LADDER_TILE_DOT(3, 5, 7);
        }
    }
    alignas(64) float sums[4][kTileRows][kTileTokens];
    LADDER_TILE_STORE(0, sums[0]);
    LADDER_TILE_STORE(1, sums[1]);
    LADDER_TILE_STORE(2, sums[2]);
    LADDER_TILE_STORE(3, sums[3]);
    const int64_t tokens = std::min(product.tokens - token, 2 * kTileTokens);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows; ++r) {
            const auto* step = sums + 2 * (t / kTileTokens);
            finish(product, token + t, row + r, step[0][r][t % kTileTokens] + step[1][r][t % kTileTokens]);
        }
}

}  // namespace

void arrange_amx(const Product& product) {
    if (!uses_tiles(product)) return arrange_avx512bf16(product);
    const uint16_t* x = static_cast<const uint16_t*>(product.x);
    uint16_t* target = static_cast<uint16_t*>(product.arranged);
    for (int64_t token = 0; token < product.tokens; token += kTileTokens)
        for (int64_t group = 0; group < product.cols; group += kGroup)
            for (int step = 0; step < 2; ++step)
                for (int pair = 0; pair < 16; ++pair)
                    for (int64_t t = token; t < token + kTileTokens; ++t)
                        for (int half = 0; half < 2; ++half) {
                            const int64_t element = group + bf16_order(step, 2 * pair + half);
                            *target++ = t < product.tokens ? x[t * product.cols + element] : uint16_t{0};
                        }
}

void multiply_amx(const NF4View& view, const Product& product, int64_t first_row, int64_t end_row) {
    if (!uses_tiles(product)) return multiply_avx512bf16(view, product, first_row, end_row);
    const TileScope tiles;
    for (int64_t row = first_row; row < end_row; row += kTileRows)
        for (int64_t token = 0; token < product.tokens; token += 2 * kTileTokens)
            multiply_tile(view, product, row, std::min<int64_t>(kTileRows, end_row - row), token);
}

}  // namespace ladder
