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
        for (int64_t i = 0; i < pairs; ++i) {
            out[2 * i] = table[bytes[i] >> 4];
            out[2 * i + 1] = table[bytes[i] & 15];
        }
    }
};

}  // namespace

void dequantize_scalar(const NF4View& view, int64_t first, int64_t count, int32_t dtype, void* out) {
    switch (dtype) {
        case kFloat32:
            return dequantize_blocks<ScalarDecode<float, as_is>>(view, first, count, static_cast<float*>(out));
        case kBFloat16:
            return dequantize_blocks<ScalarDecode<uint16_t, float_to_bf16>>(view, first, count,
                                                                            static_cast<uint16_t*>(out));
        default:
            return dequantize_blocks<ScalarDecode<uint16_t, float_to_fp16>>(view, first, count,
                                                                            static_cast<uint16_t*>(out));
    }
}

}  // namespace ladder
