// Widening on AVX2.
#include <immintrin.h>

#include <cstdint>

namespace {

struct V {
    using I = __m256i;

    static inline I zero() { return _mm256_setzero_si256(); }
    static inline I load(const uint8_t * p) { return _mm256_loadu_si256(reinterpret_cast<const I *>(p)); }
    static inline void store(uint8_t * p, I x) { _mm256_storeu_si256(reinterpret_cast<I *>(p), x); }
    static inline I either(I a, I b) { return _mm256_or_si256(a, b); }
    // Of each byte: the bits of `kMask`, after it was shifted right.
    template <int kShift, int kMask> static inline I bits(I x) {
        return _mm256_and_si256(_mm256_srli_epi16(x, kShift), _mm256_set1_epi8(kMask));
    }
    // Each byte shifted left; nothing may be lost by it.
    template <int kShift> static inline I up(I x) { return _mm256_slli_epi16(x, kShift); }
    // Bit `kBit` of each byte.
    template <int kBit> static inline uint32_t mask(I x) {
        return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(x, 7 - kBit)));
    }
    // Bytes c and 16 + c as the nibbles of byte c.
    static inline void store_nibbles(uint8_t * p, I x) {
        const __m128i high = _mm_slli_epi16(_mm256_extracti128_si256(x, 1), 4);
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm_or_si128(_mm256_castsi256_si128(x), high));
    }

    struct Table {
        I part[4];
        explicit Table(const uint8_t * codes) {
            for (int k = 0; k < 4; ++k)
                part[k] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + 16 * k)));
        }
    };
    template <int kBits> static inline I look_up(const Table & table, I x) {
        if constexpr (kBits <= 4) {
            return _mm256_shuffle_epi8(table.part[0], x);
        } else {
            // A shuffle gives zero where the topmost bit is set: where the index, less that of the part, is 16 or more.
            I found = zero();
            for (int k = 0; k < 1 << (kBits - 4); ++k) {
                const I inside = _mm256_xor_si256(x, _mm256_set1_epi8(static_cast<char>(16 * k)));
                const I place = _mm256_adds_epu8(inside, _mm256_set1_epi8(0x70));
                found = either(found, _mm256_shuffle_epi8(table.part[k], place));
            }
            return found;
        }
    }
};

}  // namespace

#include "narrow_kernels.h"

const edgellm::Wideners edgellm::kWidenAvx2 = {"AVX2", widen_type};
