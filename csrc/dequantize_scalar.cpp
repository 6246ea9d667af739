// NF4 decode in portable C++.
#include "dequantize.h"
#include "floats.h"

namespace ladder {
namespace {

template <typename Out, Out (*Round)(float)>
struct ScalarDecode {
    static void fill(const float* codebook, float scale, Out* table) {
        for (int i = 0; i < 16; ++i) table[i] = Round(codebook[i] * scale);
    }

    static void run(const uint8_t* bytes, const Out* table, int64_t pairs, Out* out) {
        look_up_pairs(bytes, table, 0, pairs, out);
    }
};

}  // namespace

void dequantize_scalar(const NF4View& view, int64_t first, int64_t count, int32_t decoded, void* out) {
    dequantize_any<ScalarDecode<float, as_is>, ScalarDecode<uint16_t, float_to_bf16>,
                   ScalarDecode<uint16_t, float_to_fp16>, ScalarDecode<float, through_bf16>,
                   ScalarDecode<float, through_fp16>>(view, first, count, decoded, out);
}

}  // namespace ladder
