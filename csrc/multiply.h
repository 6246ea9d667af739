// The product with few tokens, up to what differs between instruction sets. Internal linkage: see scales.h.
//
// A row of W is met in groups of 64 elements, 32 packed bytes. Read as eight 32-bit words, nibble j of all words is one
// vector of indices, so a shift and a permute yield 8 or 16 weights, but in another order than memory's: word w holds
// elements 8w .. 8w + 7, and its nibble j, counted from the lowest bit, is element j ^ 1 of them. A dot product does not
// mind, as long as x is put in that order too, once for all rows: this is what an ArrangeFn does.
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
    return (kPrefetchBytes + tile - 1) / tile * tile;
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

// Add the bias, round and store one element of the result.
inline void finish(const Product& product, int64_t token, int64_t row, float sum) {
    if (product.bias != nullptr) sum += load_float(product.bias, row, product.dtype);
    const int64_t index = token * product.rows + row;
    if (product.dtype == kFloat32)
        static_cast<float*>(product.out)[index] = sum;
    else
        static_cast<uint16_t*>(product.out)[index] =
            product.dtype == kBFloat16 ? float_to_bf16(sum) : float_to_fp16(sum);
}

// `Kernel::tile<rows, tokens>(view, product, row, token)` computes that many results at once, with all their sums in
// registers; `Kernel::rows(tokens)` says how many rows fit beside that many tokens, at most Kernel::kTokens.
template <typename Kernel, int kTokens>
int64_t multiply_tokens(const NF4View& view, const Product& product, int64_t row, int64_t end_row, int64_t token) {
    // Powers of two only: a version for every number of tokens would double the code for the sake of odd batches.
    if constexpr (kTokens > 1)
        if (product.tokens - token < kTokens)
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

}  // namespace
}  // namespace ladder
