// RMSNorm, rotary embedding and SwiGLU, compiled for AVX2.
#include "elementwise.h"

namespace ladder {

void rms_norm_avx2(const RmsNorm& call, int64_t begin, int64_t end) { rms_norm_any(call, begin, end); }
void rotary_avx2(const Rotary& call, int64_t begin, int64_t end) { rotary_any(call, begin, end); }
void swiglu_avx2(const SwiGlu& call, int64_t begin, int64_t end) { swiglu_any(call, begin, end); }
void rms_norm_backward_avx2(const RmsNormBackward& call, int64_t begin, int64_t end) {
    rms_norm_backward_any(call, begin, end);
}
void swiglu_backward_avx2(const SwiGluBackward& call, int64_t begin, int64_t end) {
    swiglu_backward_any(call, begin, end);
}

}  // namespace ladder
