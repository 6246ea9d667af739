// The kernels behind the C ABI of api.cpp. Every instruction set implements the same functions: decode and encode bit
// for bit, products up to the order of their sums.
#pragma once

#include <cstdint>

namespace ladder {

// An NF4 matrix, flattened. Element e has the code in packed[e / 2]: high nibble if e is even, else low nibble.
// Its scale, with b = e / block_size, is absmax[b], or with double quantization (absmax_map is not null)
// absmax_map[absmax[b]] * absmax_scale[b / 256] + *absmax_offset, the product rounded before the sum.
struct NF4View {
    const uint8_t* packed;
    const void* absmax;         // fp32, or uint8 with double quantization
    const float* codebook;      // 16 values
    const float* absmax_scale;
    const float* absmax_map;    // 256 values
    const float* absmax_offset; // 1 value
    int64_t block_size;         // even
};

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// What a weight is decoded to: a DType, or one of these, rounded to 16 bits and kept in fp32 for an fp32 product.
enum Decoded : int32_t { kBFloat16InFloat32 = 3, kFloat16InFloat32 = 4 };

// out[t, n] = sum over k of x[t, k] * W[n, k] + bias[n], rounded, + residual[t, n], for few tokens t: each packed weight is
// read from memory once. W is decoded to `dtype` and multiplied in fp32.
struct Product {
    const void* x;         // [tokens, cols] of dtype
    const void* bias;      // [rows] of dtype, or null
    const void* residual;  // [tokens, rows] of dtype, or null
    void* out;             // [tokens, rows] of dtype
    void* arranged;        // scratch for a copy of x in the order in which the kernel meets the weights
    int64_t tokens;
    int64_t rows;
    int64_t cols;  // a multiple of 64, and so is the weight's block size
    int32_t dtype;
};

// losses[r] = log(sum over v of exp(l[r, v])) - l[r, targets[r]], in fp32 inside, and the logits l become the gradient
// softmax(l) - onehot(target). A row whose target is ignored has loss 0 and gradient 0.
struct CrossEntropy {
    void* logits;            // [rows, vocabulary] of dtype, overwritten if writes_gradient
    const int64_t* targets;  // [rows], each ignored_target or in [0, vocabulary)
    float* losses;           // [rows]
    int64_t rows;
    int64_t vocabulary;
    int64_t ignored_target;
    int32_t dtype;
    int32_t writes_gradient;
};

// out = weight * (x / sqrt(mean(x^2) + epsilon)) per row, the quotient rounded to dtype before the product.
struct RmsNorm {
    const void* x;       // [rows, width], rows x_stride elements apart
    const void* weight;  // [width]
    void* out;           // [rows, width]
    int64_t rows;
    int64_t width;
    int64_t x_stride;
    float epsilon;
    int32_t dtype;
};

// With inv = 1 / sqrt(mean(x^2) + epsilon) and g = dout * weight, per row:
//     dx = residual + inv * (g - x * inv^2 * mean(g * x))
// and dweight = sum of dout * x * inv over kNormBlock rows at a time: few enough to be added one by one in fp32, and no
// sum depends on the number of threads.
constexpr int64_t kNormBlock = 16;
struct RmsNormBackward {
    const void* dout;      // [rows, width], as x and residual
    const void* x;
    const void* weight;    // [width]
    const void* residual;
    void* dx;              // [rows, width]
    float* dweight;        // [ceil(rows / kNormBlock), width]
    int64_t rows;
    int64_t width;
    float epsilon;
    int32_t dtype;
};

// out = x * cos + (-x2, x1) * sin per head, x1 and x2 being its halves, both products rounded to dtype before the sum.
// With is_backward the transposed rotation: x * cos + (y2, -y1) with y = x * sin.
struct Rotary {
    const void* x;    // [tokens, heads, head_dim], tokens x_stride elements apart
    const void* cos;  // [tokens, head_dim]
    const void* sin;  // [tokens, head_dim]
    void* out;        // [tokens, heads, head_dim], tokens out_stride elements apart
    int64_t tokens;
    int64_t heads;
    int64_t head_dim;
    int64_t x_stride;
    int64_t out_stride;
    int32_t dtype;
    int32_t is_backward;
};

// out = silu(gate) * up, silu rounded to dtype before the product. out may be gate.
struct SwiGlu {
    const void* gate;  // [rows, width], rows gate_stride elements apart
    const void* up;    // [rows, width], rows up_stride elements apart
    void* out;         // [rows, width]
    int64_t rows;
    int64_t width;
    int64_t gate_stride;
    int64_t up_stride;
    int32_t dtype;
};

// The activation silu(gate) * up as SwiGlu computes it, and from its gradient dout those of gate and up.
struct SwiGluBackward {
    const void* gate_up;  // [rows, 2 width], gate before up
    const void* dout;     // [rows, width]
    void* activation;     // [rows, width]
    void* dgate_up;       // [rows, 2 width]
    int64_t rows;
    int64_t width;
    int32_t dtype;
};

// A side layer up to its attention, or from it on. Without `mixed`, out is [rows, (heads + 2 kv_heads) head_dim]:
// rms_norm(state) times qkv, queries and keys rotated. With it, out is [rows, width]: u = state + mixed times
// attention_out, plus the SwiGLU MLP of rms_norm(u). Weights are [outputs, inputs], fp32 with wide_weights, else dtype.
struct SideLayer {
    const void* state;  // [rows, width]
    const void* mixed;  // [rows, heads * head_dim]
    const void* cos;    // [rows, head_dim]
    const void* sin;    // [rows, head_dim]
    const void* attention_norm;
    const void* qkv;
    const void* attention_out;
    const void* mlp_norm;
    const void* gate_up;  // [2 inner, width]
    const void* mlp_out;  // [width, inner]
    void* out;
    int64_t rows;
    int64_t width;
    int64_t inner;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    float epsilon;
    int32_t dtype;
    int32_t wide_weights;
};

// A frozen linear of a decoder block; cols and the weight's block size are multiples of 64.
struct DecoderLinear {
    NF4View weight;    // [rows, cols]
    const void* bias;  // [rows] of the hidden states' dtype, or null
    int64_t rows;
    int64_t cols;
};

struct DecoderBlock {
    DecoderLinear query, key, value, output, gate, up, down;
    const void* attention_norm;  // [width], as mlp_norm
    const void* mlp_norm;
    const void* query_norm;  // [head_dim] as key_norm, or both null
    const void* key_norm;
};

// Few rows that pass a decoder block: up to its attention (hidden, cos, sin -> query, key, value, of which query and key
// are normed where the block has norms for that, and rotated), or from it on (hidden, mixed -> out: u = hidden + mixed
// times output, plus the SwiGLU MLP of rms_norm(u)).
struct DecoderRows {
    const void* hidden;  // [tokens, width]
    const void* cos;     // [tokens, head_dim]
    const void* sin;     // [tokens, head_dim]
    const void* mixed;   // [tokens, columns of block.output]
    void* query;         // [tokens, heads, head_dim]
    void* key;           // [tokens, kv_heads, head_dim]
    void* value;         // [tokens, kv_heads, head_dim]
    void* out;           // [tokens, width]
    void* scratch;       // 64-byte aligned
    int64_t tokens;
    int64_t head_dim;
    float epsilon;
    int32_t dtype;
};

// Decode elements [first, first + count) to out[0 .. count): codebook value times scale in fp32, rounded once. `decoded`:
// a DType or a Decoded.
using DequantizeFn = void(const NF4View& view, int64_t first, int64_t count, int32_t decoded, void* out);

// Encode elements [first, first + count), where first is a multiple of block_size. `total` is the size of the whole
// matrix: its last block, if partial, divides by absmax where full blocks multiply by the reciprocal.
using QuantizeFn = void(const void* weight, int32_t dtype, const float* thresholds, int64_t first, int64_t count,
                        int64_t total, int64_t block_size, uint8_t* packed, float* absmax);

// Fill product.arranged: once, before any multiply.
using ArrangeFn = void(const Product& product);

// Columns [first_row, end_row) of the product's out.
using MultiplyFn = void(const NF4View& view, const Product& product, int64_t first_row, int64_t end_row);

// Rows [first_row, end_row) of `problem`.
using CrossEntropyFn = void(const CrossEntropy& problem, int64_t first_row, int64_t end_row);

// Rows, or tokens, [begin, end) of the call.
using RmsNormFn = void(const RmsNorm& call, int64_t begin, int64_t end);
using RotaryFn = void(const Rotary& call, int64_t begin, int64_t end);
using SwiGluFn = void(const SwiGlu& call, int64_t begin, int64_t end);
using SwiGluBackwardFn = void(const SwiGluBackward& call, int64_t begin, int64_t end);

// Rows [begin, end), begin a multiple of kNormBlock.
using RmsNormBackwardFn = void(const RmsNormBackward& call, int64_t begin, int64_t end);

// Rows [begin, end), with scratch of side_layer_scratch(call) bytes.
using SideLayerFn = void(const SideLayer& call, int64_t begin, int64_t end, void* scratch);

DequantizeFn dequantize_scalar, dequantize_avx2, dequantize_avx512;
QuantizeFn quantize_scalar, quantize_avx2, quantize_avx512;
ArrangeFn arrange_scalar, arrange_avx2, arrange_avx512, arrange_avx512bf16, arrange_amx;
MultiplyFn multiply_scalar, multiply_avx2, multiply_avx512, multiply_avx512bf16, multiply_amx;
CrossEntropyFn cross_entropy_scalar, cross_entropy_avx2, cross_entropy_avx512;
RmsNormFn rms_norm_scalar, rms_norm_avx2, rms_norm_avx512;
RotaryFn rotary_scalar, rotary_avx2, rotary_avx512;
SwiGluFn swiglu_scalar, swiglu_avx2, swiglu_avx512;
RmsNormBackwardFn rms_norm_backward_scalar, rms_norm_backward_avx2, rms_norm_backward_avx512;
SwiGluBackwardFn swiglu_backward_scalar, swiglu_backward_avx2, swiglu_backward_avx512;
SideLayerFn side_layer_scalar, side_layer_avx2, side_layer_avx512;

}  // namespace ladder
