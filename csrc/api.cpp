// The C ABI that ladder_kernels/native.py binds.
#include <vector>

#include "decoder_block.h"
#include "isa.h"
#include "parallel.h"
#include "side_layer.h"
#include "threaded.h"

#if defined(_MSC_VER)
#define LADDER_API extern "C" __declspec(dllexport)
#else
#define LADDER_API extern "C" __attribute__((visibility("default")))
#endif

namespace {

// Elements, or rows, per thread below which starting one costs more than it saves.
constexpr int64_t kDequantizeGrain = 1 << 16;
constexpr int64_t kQuantizeGrain = 1 << 14;
constexpr int64_t kSideLayerGrain = 4;

}  // namespace

// Raised whenever a signature or a struct below changes; native.py refuses another number.
LADDER_API int32_t ladder_abi_version() { return 6; }

LADDER_API const char* ladder_isa() { return ladder::current_isa().name; }

// 1 if this build and this CPU can run the named instruction set.
LADDER_API int32_t ladder_isa_available(const char* name) { return ladder::find_isa(name) == nullptr ? 0 : 1; }

// Choose an instruction set by name, or the fastest with "". Returns 0, or -1 if it is not available.
LADDER_API int32_t ladder_select_isa(const char* name) {
    const ladder::Isa* isa = name[0] == '\0' ? nullptr : ladder::find_isa(name);
    if (isa == nullptr && name[0] != '\0') return -1;
    ladder::select_isa(isa);
    return 0;
}

// Decode elements [first, first + count) of the flattened matrix to `out`: 0 fp32, 1 bf16, 2 fp16, 3 bf16 or 4 fp16 kept
// in fp32.
LADDER_API void ladder_dequantize_nf4(const ladder::NF4View* view, int64_t first, int64_t count, int32_t decoded,
                                      void* out, int32_t threads) {
    ladder::DequantizeFn* dequantize = ladder::current_isa().vector->dequantize;
    const int64_t item = decoded == ladder::kBFloat16 || decoded == ladder::kFloat16 ? 2 : 4;
    ladder::parallel_for(count, kDequantizeGrain, threads, [&](int64_t begin, int64_t end) {
        dequantize(*view, first + begin, end - begin, decoded, static_cast<char*>(out) + begin * item);
    });
}

// Encode `count` elements to packed[(count + 1) / 2] and absmax[ceil(count / block_size)]. thresholds: the 15 values
// between neighbouring codes. block_size: a power of two up to 4096.
LADDER_API void ladder_quantize_nf4(const void* weight, int32_t dtype, const float* thresholds, int64_t count,
                                    int64_t block_size, uint8_t* packed, float* absmax, int32_t threads) {
    ladder::QuantizeFn* quantize = ladder::current_isa().vector->quantize;
    ladder::parallel_for(count, kQuantizeGrain, threads, [&](int64_t begin, int64_t end) {
        quantize(weight, dtype, thresholds, begin, end - begin, count, block_size, packed, absmax);
    });
}

// The product with few tokens. product->arranged: at least 4 * cols * tokens bytes, tokens rounded up to 16.
LADDER_API void ladder_nf4_linear(const ladder::NF4View* view, const ladder::Product* product, int32_t threads) {
    ladder::current_isa().arrange(*product);
    ladder::multiply(*view, *product, threads);
}

LADDER_API void ladder_cross_entropy(const ladder::CrossEntropy* problem, int32_t threads) {
    ladder::CrossEntropyFn* cross_entropy = ladder::current_isa().vector->cross_entropy;
    ladder::parallel_for(problem->rows, 1, threads,
                         [&](int64_t begin, int64_t end) { cross_entropy(*problem, begin, end); });
}

LADDER_API void ladder_rms_norm(const ladder::RmsNorm* call, int32_t threads) { ladder::rms_norm(*call, threads); }

LADDER_API void ladder_rotary(const ladder::Rotary* call, int32_t threads) { ladder::rotary(*call, threads); }

LADDER_API void ladder_swiglu(const ladder::SwiGlu* call, int32_t threads) { ladder::swiglu(*call, threads); }

LADDER_API void ladder_rms_norm_backward(const ladder::RmsNormBackward* call, int32_t threads) {
    ladder::rms_norm_backward(*call, threads);
}

LADDER_API void ladder_swiglu_backward(const ladder::SwiGluBackward* call, int32_t threads) {
    ladder::swiglu_backward(*call, threads);
}

LADDER_API void ladder_side_layer(const ladder::SideLayer* call, int32_t threads) {
    ladder::SideLayerFn* side_layer = ladder::current_isa().vector->side_layer;
    ladder::parallel_for(call->rows, kSideLayerGrain, threads,
                         [&](int64_t begin, int64_t end) {
                             std::vector<char> scratch(static_cast<size_t>(ladder::side_layer_scratch(*call)));
                             side_layer(*call, begin, end, scratch.data());
                         });
}

// Bytes of rows->scratch that either half of the block needs.
LADDER_API int64_t ladder_decoder_scratch(const ladder::DecoderBlock* block, const ladder::DecoderRows* rows) {
    return ladder::DecoderScratch(*block, *rows).bytes;
}

// The block up to its attention.
LADDER_API void ladder_decoder_heads(const ladder::DecoderBlock* block, const ladder::DecoderRows* rows,
                                     int32_t threads) {
    ladder::DecoderCall(*block, *rows, threads).heads();
}

// The block from its attention on.
LADDER_API void ladder_decoder_mlp(const ladder::DecoderBlock* block, const ladder::DecoderRows* rows,
                                   int32_t threads) {
    ladder::DecoderCall(*block, *rows, threads).mlp();
}
