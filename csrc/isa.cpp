#include "isa.h"

#include <atomic>
#include <cstring>
#include <initializer_list>

#if defined(LADDER_X86)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(LADDER_HAS_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace ladder {
namespace {

bool always() { return true; }

#ifdef LADDER_X86

struct Registers {
    uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
    Registers regs;
#if defined(_MSC_VER)
    int values[4];
    __cpuidex(values, static_cast<int>(leaf), static_cast<int>(subleaf));
    regs.a = static_cast<uint32_t>(values[0]);
    regs.b = static_cast<uint32_t>(values[1]);
    regs.c = static_cast<uint32_t>(values[2]);
    regs.d = static_cast<uint32_t>(values[3]);
#else
    __get_cpuid_count(leaf, subleaf, &regs.a, &regs.b, &regs.c, &regs.d);
#endif
    return regs;
}

bool has_bits(uint32_t value, std::initializer_list<int> bits) {
    for (const int bit : bits)
        if ((value >> bit & 1u) == 0) return false;
    return true;
}

// Which registers the operating system saves between threads (XCR0).
uint32_t saved_state() {
    if (!has_bits(cpuid(1, 0).c, {27})) return 0;  // OSXSAVE
#if defined(_MSC_VER)
    return static_cast<uint32_t>(_xgetbv(0));
#else
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
#endif
}

bool has_avx2() {
    return has_bits(saved_state(), {1, 2}) && has_bits(cpuid(1, 0).c, {12, 28, 29}) &&  // FMA, AVX, F16C
           has_bits(cpuid(7, 0).b, {5});
}

bool has_avx512() {
    return has_avx2() && has_bits(saved_state(), {5, 6, 7}) && has_bits(cpuid(7, 0).b, {16, 30, 31});  // F, BW, VL
}

#ifdef LADDER_HAS_AVX512BF16
bool has_avx512bf16() {
#ifdef LADDER_EMULATE_BF16_UNITS
    return has_avx512();
#else
    return has_avx512() && has_bits(cpuid(7, 1).a, {5});
#endif
}
#endif

#ifdef LADDER_HAS_AMX
// Linux gives a process the tile registers only when it asks for them.
bool may_use_tiles() {
#ifdef __linux__
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

bool has_amx() {
#ifdef LADDER_EMULATE_BF16_UNITS
    return has_avx512bf16();
#else
    return has_avx512bf16() && has_bits(saved_state(), {17, 18}) && has_bits(cpuid(7, 0).d, {22, 24}) &&
           may_use_tiles();
#endif
}
#endif

#endif

#ifdef LADDER_X86
const VectorKernels kAvx512 = {
    dequantize_avx512, quantize_avx512, cross_entropy_avx512,
    rms_norm_avx512, rotary_avx512, swiglu_avx512,
    rms_norm_backward_avx512, swiglu_backward_avx512, side_layer_avx512};
const VectorKernels kAvx2 = {
    dequantize_avx2, quantize_avx2, cross_entropy_avx2,
    rms_norm_avx2, rotary_avx2, swiglu_avx2,
    rms_norm_backward_avx2, swiglu_backward_avx2, side_layer_avx2};
#endif
const VectorKernels kScalar = {
    dequantize_scalar, quantize_scalar, cross_entropy_scalar,
    rms_norm_scalar, rotary_scalar, swiglu_scalar,
    rms_norm_backward_scalar, swiglu_backward_scalar, side_layer_scalar};

// Fastest first.
const Isa kIsas[] = {
#ifdef LADDER_HAS_AMX
    {"amx", has_amx, arrange_amx, multiply_amx, &kAvx512},
#endif
#ifdef LADDER_HAS_AVX512BF16
    {"avx512bf16", has_avx512bf16, arrange_avx512bf16, multiply_avx512bf16, &kAvx512},
#endif
#ifdef LADDER_X86
    {"avx512", has_avx512, arrange_avx512, multiply_avx512, &kAvx512},
    {"avx2", has_avx2, arrange_avx2, multiply_avx2, &kAvx2},
#endif
    {"scalar", always, arrange_scalar, multiply_scalar, &kScalar},
};

const Isa* fastest_isa() {
    for (const Isa& isa : kIsas)
        if (isa.available()) return &isa;
    return nullptr;
}

std::atomic<const Isa*> selected{nullptr};

}  // namespace

const Isa& current_isa() {
    const Isa* isa = selected.load(std::memory_order_relaxed);
    if (isa == nullptr) {
        isa = fastest_isa();
        selected.store(isa, std::memory_order_relaxed);
    }
    return *isa;
}

const Isa* find_isa(const char* name) {
    for (const Isa& isa : kIsas)
        if (std::strcmp(isa.name, name) == 0 && isa.available()) return &isa;
    return nullptr;
}

void select_isa(const Isa* isa) { selected.store(isa == nullptr ? fastest_isa() : isa); }

}  // namespace ladder
