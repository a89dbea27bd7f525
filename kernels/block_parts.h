// Parts of the blocks of GGUF matrices, read as numbers.
#pragma once

#include <cstdint>
#include <cstring>

namespace edgellm {

inline float half_to_float(const uint8_t * p) {
    uint16_t h;
    std::memcpy(&h, p, 2);
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    const uint32_t exponent = (h >> 10) & 31, fraction = h & 1023;
    float value;
    if (exponent == 0) {
        value = static_cast<float>(fraction) * 0x1p-24f;
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits |= sign;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    const uint32_t bits = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (fraction << 13);
    std::memcpy(&value, &bits, 4);
    return value;
}

// Of the eight scales and eight minima of six bits in the twelve bytes of a Q4_K or Q5_K block: those of sub-block j.
inline uint8_t k_scale(const uint8_t * factors, int j) {
    return static_cast<uint8_t>(j < 4 ? factors[j] & 63 : (factors[j + 4] & 15) | ((factors[j - 4] >> 6) << 4));
}
inline uint8_t k_minimum(const uint8_t * factors, int j) {
    return static_cast<uint8_t>(j < 4 ? factors[j + 4] & 63 : (factors[j + 4] >> 4) | ((factors[j] >> 6) << 4));
}

}  // namespace edgellm
