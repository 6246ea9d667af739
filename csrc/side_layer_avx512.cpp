// The side layer of few rows, compiled for AVX-512 F/BW/VL.
#include "side_layer.h"

namespace ladder {

void side_layer_avx512(const SideLayer& call, int64_t begin, int64_t end, void* scratch) {
    side_layer_any(call, begin, end, scratch);
}

}  // namespace ladder
