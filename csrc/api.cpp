// The C ABI that ladder_kernels/native.py binds, and the choice of instruction set.
#include <atomic>
#include <cstring>

#include "kernels.h"
#include "parallel.h"

#if defined(_MSC_VER)
#define LADDER_API extern "C" __declspec(dllexport)
#include <intrin.h>
#else
#define LADDER_API extern "C" __attribute__((visibility("default")))
#endif

namespace ladder {
namespace {

struct Isa {
    const char* name;
    bool (*available)();
    DequantizeFn dequantize;
    QuantizeFn quantize;
};

bool always() { return true; }

#ifdef LADDER_HAS_AVX512
bool has_avx512() {
#if defined(_MSC_VER)
    int regs[4];
    __cpuid(regs, 1);
    if ((regs[2] & (1 << 27)) == 0 || (_xgetbv(0) & 0xe6) != 0xe6) return false;  // the OS saves the zmm state
    __cpuidex(regs, 7, 0);
    const unsigned needed = (1u << 16) | (1u << 30) | (1u << 31);  // F, BW, VL
    return (static_cast<unsigned>(regs[1]) & needed) == needed;
#else
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
#endif
}
#endif

// Fastest first.
const Isa kIsas[] = {
#ifdef LADDER_HAS_AVX512
    {"avx512", has_avx512, dequantize_avx512, quantize_avx512},
#endif
    {"scalar", always, dequantize_scalar, quantize_scalar},
};

const Isa* fastest_isa() {
    for (const Isa& isa : kIsas)
        if (isa.available()) return &isa;
    return nullptr;
}

std::atomic<const Isa*> selected{nullptr};

const Isa& current_isa() {
    const Isa* isa = selected.load(std::memory_order_relaxed);
    if (isa == nullptr) {
        isa = fastest_isa();
        selected.store(isa, std::memory_order_relaxed);
    }
    return *isa;
}

// Elements per thread below which starting one costs more than it saves.
constexpr int64_t kDequantizeGrain = 1 << 16;
constexpr int64_t kQuantizeGrain = 1 << 14;

}  // namespace
}  // namespace ladder

// Raised whenever a signature below changes; native.py refuses another number.
LADDER_API int32_t ladder_abi_version() { return 1; }

LADDER_API const char* ladder_isa() { return ladder::current_isa().name; }

// 1 if this build and this CPU can run the named instruction set.
LADDER_API int32_t ladder_isa_available(const char* name) {
    for (const auto& isa : ladder::kIsas)
        if (std::strcmp(isa.name, name) == 0) return isa.available() ? 1 : 0;
    return 0;
}

// Choose an instruction set by name, or the fastest with "". Returns 0, or -1 if it is not available.
LADDER_API int32_t ladder_select_isa(const char* name) {
    if (name[0] == '\0') {
        ladder::selected.store(ladder::fastest_isa());
        return 0;
    }
    for (const auto& isa : ladder::kIsas) {
        if (std::strcmp(isa.name, name) == 0 && isa.available()) {
            ladder::selected.store(&isa);
            return 0;
        }
    }
    return -1;
}

// Decode elements [first, first + count) of the flattened matrix. `absmax` is fp32, or uint8 codes when absmax_map is
// not null; the fields are those of NF4View. dtype: 0 fp32, 1 bf16, 2 fp16.
LADDER_API void ladder_dequantize_nf4(const uint8_t* packed, const float* codebook, const void* absmax,
                                      const float* absmax_scale, const float* absmax_map, const float* absmax_offset,
                                      int64_t block_size, int64_t first, int64_t count, int32_t dtype, void* out,
                                      int32_t threads) {
    const bool nested = absmax_map != nullptr;
    const ladder::NF4View view{packed,
                               codebook,
                               nested ? nullptr : static_cast<const float*>(absmax),
                               nested ? static_cast<const uint8_t*>(absmax) : nullptr,
                               absmax_scale,
                               absmax_map,
                               absmax_offset,
                               block_size};
    const ladder::DequantizeFn dequantize = ladder::current_isa().dequantize;
    const int64_t item = dtype == ladder::kFloat32 ? 4 : 2;
    ladder::parallel_for(count, ladder::kDequantizeGrain, threads, [&](int64_t begin, int64_t end) {
        dequantize(view, first + begin, end - begin, dtype, static_cast<char*>(out) + begin * item);
    });
}

// Encode `count` elements to packed[(count + 1) / 2] and absmax[ceil(count / block_size)]. thresholds: the 15 values
// between neighbouring codes. block_size: a power of two up to 4096.
LADDER_API void ladder_quantize_nf4(const void* weight, int32_t dtype, const float* thresholds, int64_t count,
                                    int64_t block_size, uint8_t* packed, float* absmax, int32_t threads) {
    const ladder::QuantizeFn quantize = ladder::current_isa().quantize;
    ladder::parallel_for(count, ladder::kQuantizeGrain, threads, [&](int64_t begin, int64_t end) {
        quantize(weight, dtype, thresholds, begin, end - begin, count, block_size, packed, absmax);
    });
}
