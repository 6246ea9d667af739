// The exponential function in a form that compilers vectorize. Internal linkage (see scales.h).
#pragma once

#include "floats.h"

namespace ladder {
namespace {

// exp(x) for x <= 0 to about one unit in the last place, 0 below -87, NaN for NaN. x = n * log(2) + r, and exp(r) by the
// polynomial of Cephes' expf.
inline float exp_nonpositive(float x) {
    constexpr float kRoundingShift = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the last bits
    const float bounded = x < -87.0f ? -87.0f : x;
    const float shifted = bounded * 1.44269504088896341f + kRoundingShift;
    const float n = shifted - kRoundingShift;
    const float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const uint32_t exponent = float_bits(shifted) - float_bits(kRoundingShift) + 127u;
    return x < -87.0f ? 0.0f : y * bits_float(exponent << 23);
}

}  // namespace
}  // namespace ladder
