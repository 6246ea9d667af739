// NF4 encode, compiled for AVX2.
#include "quantize.h"

namespace ladder {

void quantize_avx2(const void* weight, int32_t dtype, const float* thresholds, int64_t first, int64_t count,
                     int64_t total, int64_t block_size, uint8_t* packed, float* absmax) {
    quantize_any<CountThresholds>(weight, dtype, thresholds, first, count, total, block_size, packed, absmax);
}

}  // namespace ladder
