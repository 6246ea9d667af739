// RMSNorm, rotary embedding and SwiGLU, compiled for the baseline of the architecture.
#include "elementwise.h"

namespace ladder {

void rms_norm_scalar(const RmsNorm& call, int64_t begin, int64_t end) { rms_norm_any(call, begin, end); }
void rotary_scalar(const Rotary& call, int64_t begin, int64_t end) { rotary_any(call, begin, end); }
void swiglu_scalar(const SwiGlu& call, int64_t begin, int64_t end) { swiglu_any(call, begin, end); }
void rms_norm_backward_scalar(const RmsNormBackward& call, int64_t begin, int64_t end) {
    rms_norm_backward_any(call, begin, end);
}
void swiglu_backward_scalar(const SwiGluBackward& call, int64_t begin, int64_t end) {
    swiglu_backward_any(call, begin, end);
}

}  // namespace ladder
