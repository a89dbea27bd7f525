// CRC-32C (Castagnoli, RFC 3720 appendix B.4) of bytes: by the processor's instruction where it has one.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace edgellm {

namespace crc {

constexpr uint32_t kPolynomial = 0x82F63B78;  // reflected

constexpr std::array<uint32_t, 256> make_table() {
    std::array<uint32_t, 256> table{};
    for (uint32_t i = 0; i < 256; ++i) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) != 0 ? kPolynomial : 0);
        table[i] = value;
    }
    return table;
}

inline uint32_t by_table(const uint8_t * data, size_t size) {
    static constexpr std::array<uint32_t, 256> table = make_table();
    uint32_t value = ~uint32_t{0};
    for (size_t i = 0; i < size; ++i) value = (value >> 8) ^ table[(value ^ data[i]) & 0xFF];
    return ~value;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) inline uint32_t by_instruction(const uint8_t * data, size_t size) {
    uint64_t value = ~uint32_t{0};
    for (; size >= 8; data += 8, size -= 8) {
        uint64_t word;
        std::memcpy(&word, data, 8);
        value = _mm_crc32_u64(value, word);
    }
    auto rest = static_cast<uint32_t>(value);
    for (; size > 0; ++data, --size) rest = _mm_crc32_u8(rest, *data);
    return ~rest;
}
#endif

}  // namespace crc

inline uint32_t crc32c(const uint8_t * data, size_t size) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2")) return crc::by_instruction(data, size);
#endif
    return crc::by_table(data, size);
}

}  // namespace edgellm
