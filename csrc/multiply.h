// The product with few tokens, up to what differs between instruction sets. Internal linkage: see scales.h.
//
// A row of W is met in groups of 64 elements, 32 packed bytes. Read as eight 32-bit words, nibble j of all words is one
// vector of indices, so a shift and a permute yield 8 or 16 weights, but in another order than memory's: word w holds
// elements 8w .. 8w + 7, and its nibble j, counted from the lowest bit, is element j ^ 1 of them. A dot product does not
// mind, as long as x is put in that order too, once for all rows: this is what an ArrangeFn does. It also puts the
// vectors of the tokens of a tile side by side: rows a power of two apart would share a few sets of the cache.
#pragma once

#include "floats.h"
#include "kernels.h"
#include "scales.h"

namespace ladder {
namespace {

constexpr int64_t kGroup = 64;
constexpr int64_t kRowsInCache = 32;  // packed rows that stay in the second-level cache between groups of tokens
constexpr int64_t kPrefetchBytes = 8192;
constexpr int64_t kScaleRun = 256;    // groups whose scales are decoded ahead, on the stack

// How far ahead of a tile its packed weights are asked for, in bytes: whole tiles, at least two pages. Its rows are
// read side by side and each is short, so that the processor does not see by itself that they follow each other.
inline int64_t prefetch_distance(int64_t rows, int64_t groups) {
    const int64_t tile = rows * groups * (kGroup / 2);
    if (tile >= kPrefetchBytes) return tile;
    // In 32 bits: in 64 a division took 3% of the time of short rows.
    return static_cast<uint32_t>(kPrefetchBytes + tile - 1) / static_cast<uint32_t>(tile) * tile;
}

// As numbers: a pointer that far may lie beyond the array, where a request is ignored.
inline void prefetch(const uint8_t* packed, int64_t ahead) {
#if defined(__GNUC__)
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(packed) + static_cast<uintptr_t>(ahead)));
#else
    static_cast<void>(packed);
    static_cast<void>(ahead);
#endif
}

inline float load_float(const void* values, int64_t index, int32_t dtype) {
    if (dtype == kFloat32) return static_cast<const float*>(values)[index];
    const uint16_t bits = static_cast<const uint16_t*>(values)[index];
    return dtype == kBFloat16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

inline void store_float(void* values, int64_t index, int32_t dtype, float value) {
    if (dtype == kFloat32)
        static_cast<float*>(values)[index] = value;
    else
        static_cast<uint16_t*>(values)[index] = dtype == kBFloat16 ? float_to_bf16(value) : float_to_fp16(value);
}

// Add the bias, round and store one element of the result; a residual is added to what was rounded.
inline void finish(const Product& product, int64_t token, int64_t row, float sum) {
    if (product.bias != nullptr) sum += load_float(product.bias, row, product.dtype);
    const int64_t index = token * product.rows + row;
    store_float(product.out, index, product.dtype, sum);
    if (product.residual == nullptr) return;
    const float rounded = load_float(product.out, index, product.dtype);
    store_float(product.out, index, product.dtype, load_float(product.residual, index, product.dtype) + rounded);
}

// Tokens of the next tile: a power of two, at most `most`. A kernel for every number of tokens would multiply the code for
// the sake of odd batches.
inline int64_t tile_tokens(int64_t tokens_left, int64_t most) {
    while (most > tokens_left) most /= 2;
    return most;
}

// x in fp32 for kernels that read 16 numbers of a token at a time: [tile][group][4][token][16], the sixteen being nibble j
// of the eight words, then nibble j + 4 of them.
template <int kTokens>
void arrange_floats(const Product& product) {
    float* target = static_cast<float*>(product.arranged);
    for (int64_t first = 0, tile = 0; first < product.tokens; first += tile) {
        tile = tile_tokens(product.tokens - first, kTokens);
        for (int64_t group = 0; group < product.cols; group += kGroup)
            for (int64_t j = 0; j < 4; ++j)
                for (int64_t token = first; token < first + tile; ++token)
                    for (int64_t lane = 0; lane < 16; ++lane) {
                        const int64_t nibble = j + (lane < 8 ? 0 : 4);
                        const int64_t element = group + 8 * (lane % 8) + (nibble ^ 1);
                        *target++ = load_float(product.x, token * product.cols + element, product.dtype);
                    }
    }
}

// `Kernel::tile<rows, tokens>(view, product, row, token)` computes that many results at once, with all their sums in
// registers; `Kernel::rows(tokens)` says how many rows fit beside that many tokens, at most Kernel::kTokens.
template <typename Kernel, int kTokens>
int64_t multiply_tokens(const NF4View& view, const Product& product, int64_t row, int64_t end_row, int64_t token) {
    if constexpr (kTokens > 1)
        if (tile_tokens(product.tokens - token, kTokens) < kTokens)
            return multiply_tokens<Kernel, kTokens / 2>(view, product, row, end_row, token);
    constexpr int kRows = Kernel::rows(kTokens);
    for (; row + kRows <= end_row; row += kRows) Kernel::template tile<kRows, kTokens>(view, product, row, token);
    for (; row < end_row; ++row) Kernel::template tile<1, kTokens>(view, product, row, token);
    return kTokens;
}

template <typename Kernel>
void multiply_rows(const NF4View& view, const Product& product, int64_t first_row, int64_t end_row) {
    for (int64_t row = first_row; row < end_row; row += kRowsInCache) {
        const int64_t stop = row + kRowsInCache < end_row ? row + kRowsInCache : end_row;
        for (int64_t token = 0; token < product.tokens;)
            token += multiply_tokens<Kernel, Kernel::kTokens>(view, product, row, stop, token);
    }
}

// The kernel of the product's dtype.
template <typename Float32, typename BFloat16, typename Float16>
void multiply_any(const NF4View& view, const Product& product, int64_t first_row, int64_t end_row) {
    if (product.dtype == kFloat32) return multiply_rows<Float32>(view, product, first_row, end_row);
    if (product.dtype == kBFloat16) return multiply_rows<BFloat16>(view, product, first_row, end_row);
    multiply_rows<Float16>(view, product, first_row, end_row);
}

}  // namespace
}  // namespace ladder
