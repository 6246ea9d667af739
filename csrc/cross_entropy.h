// Cross entropy and its gradient in the memory of the logits, written so that a compiler vectorizes it: each instruction
// set's file compiles its own copy, with internal linkage (see scales.h).
#pragma once

#include <cmath>

#include "exp.h"
#include "floats.h"
#include "kernels.h"

namespace ladder {
namespace {

constexpr int64_t kSoftmaxBlock = 512;  // logits at a time, in the first-level cache
constexpr int64_t kLanes = 16;

template <typename T, float (*ToFloat)(T)>
float largest_logit(const T* logits, int64_t size) {
    float largest[kLanes];
    for (float& value : largest) value = -INFINITY;
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            const float value = ToFloat(logits[i + lane]);
            largest[lane] = value > largest[lane] ? value : largest[lane];
        }
    for (; i < size; ++i) {
        const float value = ToFloat(logits[i]);
        largest[0] = value > largest[0] ? value : largest[0];
    }
    for (const float value : largest) largest[0] = value > largest[0] ? value : largest[0];
    return largest[0];
}

// Blocks are summed in fp32 and added up in fp64.
template <typename T, float (*ToFloat)(T)>
double sum_of_exps(const T* logits, int64_t size, float largest) {
    double total = 0.0;
    float exps[kSoftmaxBlock];
    for (int64_t begin = 0; begin < size; begin += kSoftmaxBlock) {
        const int64_t count = begin + kSoftmaxBlock < size ? kSoftmaxBlock : size - begin;
        for (int64_t i = 0; i < count; ++i) exps[i] = exp_nonpositive(ToFloat(logits[begin + i]) - largest);
        for (int64_t i = count; i < kSoftmaxBlock; ++i) exps[i] = 0.0f;
        float sums[kLanes] = {};
        for (int64_t i = 0; i < kSoftmaxBlock; i += kLanes)
            for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += exps[i + lane];
        for (const float sum : sums) total += static_cast<double>(sum);
    }
    return total;
}

template <typename T, float (*ToFloat)(T), T (*FromFloat)(float)>
void cross_entropy_rows(const CrossEntropy& problem, int64_t first_row, int64_t end_row) {
    const int64_t size = problem.vocabulary;
    for (int64_t row = first_row; row < end_row; ++row) {
        T* logits = static_cast<T*>(problem.logits) + row * size;
        const int64_t target = problem.targets[row];
        if (target == problem.ignored_target) {
            problem.losses[row] = 0.0f;
            if (problem.writes_gradient)
                for (int64_t i = 0; i < size; ++i) logits[i] = T{0};
            continue;
        }
        const float largest = largest_logit<T, ToFloat>(logits, size);
        const double total = sum_of_exps<T, ToFloat>(logits, size, largest);
        const float target_logit = ToFloat(logits[target]) - largest;
        problem.losses[row] = static_cast<float>(std::log(total) - static_cast<double>(target_logit));
        if (!problem.writes_gradient) continue;
        const float share = static_cast<float>(1.0 / total);
        for (int64_t i = 0; i < size; ++i) logits[i] = FromFloat(exp_nonpositive(ToFloat(logits[i]) - largest) * share);
        logits[target] = FromFloat(exp_nonpositive(target_logit) * share - 1.0f);
    }
}

inline void cross_entropy_any(const CrossEntropy& problem, int64_t first_row, int64_t end_row) {
    switch (problem.dtype) {
        case kFloat32:
            return cross_entropy_rows<float, as_is, as_is>(problem, first_row, end_row);
        case kBFloat16:
            return cross_entropy_rows<uint16_t, bf16_to_float, float_to_bf16>(problem, first_row, end_row);
        default:
            return cross_entropy_rows<uint16_t, fp16_to_float, float_to_fp16>(problem, first_row, end_row);
    }
}

}  // namespace
}  // namespace ladder
