// What a frozen decoder block computes around its attention, for few rows: the kernels of kernels.h one after the other,
// so the bits are those of single calls. Products that share their x have it arranged once.
#pragma once

#include <algorithm>

#include "threaded.h"

namespace ladder {

// Byte offsets of intermediate results. All sizes are multiples of 64 bytes, for every width is one of 64 elements.
struct DecoderScratch {
    int64_t arranged, normed, state, first, second, bytes;

    DecoderScratch(const DecoderBlock& block, const DecoderRows& rows) {
        constexpr int64_t kTokenMultiple = 16;
        const int64_t item = rows.dtype == kFloat32 ? 4 : 2, width = block.query.cols;
        const int64_t wide = std::max(block.output.cols, block.down.cols);  // of all heads, or of the MLP
        const int64_t padded = (rows.tokens + kTokenMultiple - 1) / kTokenMultiple * kTokenMultiple;
        arranged = 0;
        normed = arranged + 4 * padded * std::max(wide, width);
        state = normed + rows.tokens * width * item;
        first = state + rows.tokens * width * item;
        second = first + rows.tokens * wide * item;
        bytes = second + rows.tokens * wide * item;
    }
};

class DecoderCall {
   public:
    DecoderCall(const DecoderBlock& block, const DecoderRows& rows, int64_t threads)
        : block_(block), rows_(rows), scratch_(block, rows), threads_(threads) {}

    void heads() const {
        norm(rows_.hidden, block_.attention_norm, at(scratch_.normed), rows_.tokens, block_.query.cols);
        arrange(at(scratch_.normed), block_.query.cols);
        rotated(block_.query, block_.query_norm, rows_.query);
        rotated(block_.key, block_.key_norm, rows_.key);
        times(block_.value, nullptr, rows_.value);
    }

    void mlp() const {
        const int64_t width = block_.gate.cols, inner = block_.down.cols;
        void *state = at(scratch_.state), *gate = at(scratch_.first), *up = at(scratch_.second);
        arrange(rows_.mixed, block_.output.cols);
        times(block_.output, rows_.hidden, state);
        norm(state, block_.mlp_norm, at(scratch_.normed), rows_.tokens, width);
        arrange(at(scratch_.normed), width);
        times(block_.gate, nullptr, gate);
        times(block_.up, nullptr, up);
        swiglu({gate, up, gate, rows_.tokens, inner, inner, inner, rows_.dtype}, threads_);
        arrange(gate, inner);
        times(block_.down, state, rows_.out);
    }

   private:
    void* at(int64_t offset) const { return static_cast<char*>(rows_.scratch) + offset; }

    void norm(const void* x, const void* weight, void* out, int64_t rows, int64_t width) const {
        rms_norm({x, weight, out, rows, width, width, rows_.epsilon, rows_.dtype}, threads_);
    }

    void arrange(const void* x, int64_t cols) const {
        current_isa().arrange(
            {x, nullptr, nullptr, nullptr, at(scratch_.arranged), rows_.tokens, 0, cols, rows_.dtype});
    }

    // out = what was arranged last times the weight, plus bias, plus the residual where there is one.
    void times(const DecoderLinear& linear, const void* residual, void* out) const {
        multiply(linear.weight,
                 {nullptr, linear.bias, residual, out, at(scratch_.arranged), rows_.tokens, linear.rows, linear.cols,
                  rows_.dtype},
                 threads_);
    }

    void rotated(const DecoderLinear& linear, const void* weight, void* out) const {
        const int64_t size = rows_.head_dim, heads = linear.rows / size;
        void* projected = at(scratch_.first);
        times(linear, nullptr, projected);
        if (weight != nullptr) {
            norm(projected, weight, at(scratch_.second), rows_.tokens * heads, size);
            projected = at(scratch_.second);
        }
        const int64_t width = heads * size;
        rotary({projected, rows_.cos, rows_.sin, out, rows_.tokens, heads, size, width, width, rows_.dtype, 0},
               threads_);
    }

    const DecoderBlock& block_;
    const DecoderRows& rows_;
    const DecoderScratch scratch_;
    const int64_t threads_;
};

}  // namespace ladder
