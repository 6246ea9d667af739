// Cross entropy, compiled for AVX-512 F/BW/VL.
#include "cross_entropy.h"

namespace ladder {

void cross_entropy_avx512(const CrossEntropy& problem, int64_t first_row, int64_t end_row) {
    cross_entropy_any(problem, first_row, end_row);
}

}  // namespace ladder
