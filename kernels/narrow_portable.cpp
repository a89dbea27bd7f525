// Widening on any processor: loops that compilers turn into vector instructions, but for the table.
#include <cstdint>
#include <cstring>

namespace {

struct V {
    struct I {
        uint8_t byte[32];
    };
    template <class F> static inline I each(F f) {
        I x;
        for (int i = 0; i < 32; ++i) x.byte[i] = static_cast<uint8_t>(f(i));
        return x;
    }

    static inline I zero() { return {}; }
    static inline I load(const uint8_t * p) {
        I x;
        std::memcpy(x.byte, p, 32);
        return x;
    }
    static inline void store(uint8_t * p, const I & x) { std::memcpy(p, x.byte, 32); }
    static inline I either(const I & a, const I & b) {
        return each([&](int i) { return a.byte[i] | b.byte[i]; });
    }
    template <int kShift, int kMask> static inline I bits(const I & x) {
        return each([&](int i) { return (x.byte[i] >> kShift) & kMask; });
    }
    template <int kShift> static inline I up(const I & x) {
        return each([&](int i) { return x.byte[i] << kShift; });
    }
    template <int kBit> static inline uint32_t mask(const I & x) {
        uint32_t all = 0;
        for (int i = 0; i < 32; ++i) all |= static_cast<uint32_t>((x.byte[i] >> kBit) & 1) << i;
        return all;
    }
    static inline void store_nibbles(uint8_t * p, const I & x) {
        for (int i = 0; i < 16; ++i) p[i] = static_cast<uint8_t>(x.byte[i] | x.byte[16 + i] << 4);
    }

    struct Table {
        uint8_t code[64];
        explicit Table(const uint8_t * codes) { std::memcpy(code, codes, 64); }
    };
    template <int> static inline I look_up(const Table & table, const I & x) {
        return each([&](int i) { return table.code[x.byte[i]]; });
    }
};

}  // namespace

#include "narrow_kernels.h"

const edgellm::Wideners edgellm::kWidenPortable = {"portable", widen_type};
