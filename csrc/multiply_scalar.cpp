// The product with few tokens in portable C++.
#include "multiply.h"

namespace ladder {
namespace {

template <float (*Round)(float)>
struct ScalarKernel {
    static constexpr int kTokens = 8;
    static constexpr int rows(int) { return 1; }

    template <int kRows, int kTile>
    static void tile(const NF4View& view, const Product& product, int64_t row, int64_t token) {
        static_assert(kRows == 1, "one row at a time");
        const int64_t groups = product.cols / kGroup;
        constexpr int kLanes = 8;  // independent sums, so that a compiler may use what vectors the baseline has
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

void multiply_scalar(const NF4View& view, const Product& product, int64_t first_row, int64_t end_row) {
    multiply_any<ScalarKernel<as_is>, ScalarKernel<through_bf16>, ScalarKernel<through_fp16>>(view, product, first_row,
                                                                                              end_row);
}

}  // namespace ladder
