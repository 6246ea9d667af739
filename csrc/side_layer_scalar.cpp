// The side layer of few rows, compiled for the baseline of the architecture.
#include "side_layer.h"

namespace ladder {

void side_layer_scalar(const SideLayer& call, int64_t begin, int64_t end, void* scratch) {
    side_layer_any(call, begin, end, scratch);
}

}  // namespace ladder
