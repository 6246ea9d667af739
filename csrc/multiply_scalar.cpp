// The product with few tokens in portable C++, and the arrangement of x that the vector paths share.
#include "multiply.h"

namespace ladder {
namespace {

float through_bf16(float value) { return bf16_to_float(float_to_bf16(value)); }
float through_fp16(float value) { return fp16_to_float(float_to_fp16(value)); }

template <float (*Round)(float)>
struct ScalarKernel {
    static constexpr int kTokens = 8;
    static constexpr int rows(int) { return 1; }

    template <int kRows, int kTile>
    static void tile(const NF4View& view, const Product& product, int64_t row, int64_t token) {
        static_assert(kRows == 1, "one row at a time");
        constexpr int kLanes = 8;  // independent sums, so that a compiler may use what vectors the baseline has
        const int64_t groups = product.cols / kGroup;
        const float* x = static_cast<const float*>(product.arranged) + token * product.cols;
        float sums[kTile][kLanes] = {};
        for (int64_t group = 0; group < groups; ++group) {
            float scale, table[16], weights[kGroup];
            group_scales(view, row * groups + group, 1, &scale);
            for (int i = 0; i < 16; ++i) table[i] = Round(view.codebook[i] * scale);
            const uint8_t* packed = view.packed + (row * groups + group) * (kGroup / 2);
            for (int i = 0; i < kGroup / 2; ++i) {
                weights[2 * i] = table[packed[i] >> 4];
                weights[2 * i + 1] = table[packed[i] & 15];
            }
            for (int t = 0; t < kTile; ++t) {
                const float* values = x + t * product.cols + group * kGroup;
                for (int i = 0; i < kGroup; i += kLanes)
                    for (int lane = 0; lane < kLanes; ++lane) sums[t][lane] += weights[i + lane] * values[i + lane];
            }
        }
        for (int t = 0; t < kTile; ++t) {
            float sum = 0;
            for (int lane = 0; lane < kLanes; ++lane) sum += sums[t][lane];
            finish(product, token + t, row, sum);
        }
    }
};

}  // namespace

void arrange_scalar(const Product& product) {
    float* arranged = static_cast<float*>(product.arranged);
    for (int64_t i = 0; i < product.tokens * product.cols; ++i) arranged[i] = load_float(product.x, i, product.dtype);
}

void arrange_vector(const Product& product) {
    float* arranged = static_cast<float*>(product.arranged);
    for (int64_t group = 0; group < product.tokens * product.cols; group += kGroup)
        // Sixteen at a time: nibble j of the eight words, then nibble j + 4 of them.
        for (int i = 0; i < kGroup; ++i) {
            const int nibble = i / 16 + (i % 16 < 8 ? 0 : 4);
            arranged[group + i] = load_float(product.x, group + 8 * (i % 8) + (nibble ^ 1), product.dtype);
        }
}

void multiply_scalar(const NF4View& view, const Product& product, int64_t first_row, int64_t end_row) {
    switch (product.dtype) {
        case kFloat32:
            return multiply_rows<ScalarKernel<as_is>>(view, product, first_row, end_row);
        case kBFloat16:
            return multiply_rows<ScalarKernel<through_bf16>>(view, product, first_row, end_row);
        default:
            return multiply_rows<ScalarKernel<through_fp16>>(view, product, first_row, end_row);
    }
}

}  // namespace ladder
