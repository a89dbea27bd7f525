// Packed weights on AVX2: eight rows in one vector, two vectors a group.
#include <immintrin.h>

#include <cmath>
#include <cstdint>

namespace {

struct V {
    using I = __m256i;
    using F = __m256;
    static constexpr int kLanes = 8;
    // Products of two unsigned and signed bytes are added in 16 bits, too few for weights of eight bits: those are
    // multiplied as signed ones, so there is no centre to take off.
    static constexpr bool kSignedWide = true;

    static inline I load(const void * p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
    static inline I zero_i() { return _mm256_setzero_si256(); }
    static inline F zero() { return _mm256_setzero_ps(); }
    static inline I low_nibble(I x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
    static inline I high_nibble(I x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
    static inline I add_fifth_bit(I x, const uint8_t * mask, int h) {
        int32_t bits;
        __builtin_memcpy(&bits, mask + 4 * h, 4);
        // Byte i takes byte i / 8 of the mask, of which it keeps bit i % 8.
        const I spread = _mm256_shuffle_epi8(
            _mm256_set1_epi32(bits),
            _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3));
        const I bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ULL));
        const I set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
        return _mm256_or_si256(x, _mm256_and_si256(set, _mm256_set1_epi8(16)));
    }
    template <int J> static inline I add_pair(I x, I pairs) {
        const I moved = J == 0   ? _mm256_slli_epi16(pairs, 4)
                        : J == 1 ? _mm256_slli_epi16(pairs, 2)
                        : J == 2 ? pairs
                                 : _mm256_srli_epi16(pairs, 2);
        return _mm256_or_si256(x, _mm256_and_si256(moved, _mm256_set1_epi8(0x30)));
    }
    static inline F halves(const void * p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i *>(p))); }
    static inline F bytes(const void * p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i *>(p))));
    }
    static inline F signed_bytes(const void * p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i *>(p))));
    }
    static inline F broadcast_f(const void * p) { return _mm256_castsi256_ps(broadcast_i(p)); }
    static inline I broadcast_i(const void * p) {
        int32_t x;
        __builtin_memcpy(&x, p, 4);
        return _mm256_set1_epi32(x);
    }
    template <bool Wide> static inline I dot(I sum, I w, const void * activations) {
        const I a = broadcast_i(activations);
        I pairs;
        if constexpr (Wide) {
            const I s = _mm256_xor_si256(w, _mm256_set1_epi8(static_cast<char>(0x80)));
            pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(a, s));
        } else {
            pairs = _mm256_maddubs_epi16(w, a);
        }
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static inline F to_float(I x) { return _mm256_cvtepi32_ps(x); }
    static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static inline F neg(F a) { return _mm256_sub_ps(_mm256_setzero_ps(), a); }
    static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static inline void store(float * p, F x) { _mm256_storeu_ps(p, x); }

    // Rounds 32 floats to bytes; returns the scale, and the sums of the two halves' bytes. The scale of a block that
    // holds a NaN or an infinity is NaN, so that what is computed from it shows it.
    static inline float round_block(const float * x, int8_t * out, int32_t * sums) {
        float largest = 0, odd = 0;
        for (int i = 0; i < 32; ++i) {
            const float magnitude = std::fabs(x[i]);
            largest = magnitude > largest ? magnitude : largest;
            odd += x[i] * 0.0f;
        }
        const float scale = largest / 127.0f, inverse = largest > 0 ? 127.0f / largest : 0.0f;
        sums[0] = sums[1] = 0;
        for (int i = 0; i < 4; ++i) {
            const I v = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(inverse)));
            int32_t lanes[8];
            _mm256_storeu_si256(reinterpret_cast<I *>(lanes), v);
            for (int j = 0; j < 8; ++j) {
                out[8 * i + j] = static_cast<int8_t>(lanes[j]);
                sums[i / 2] += out[8 * i + j];
            }
        }
        return odd == 0.0f ? scale : __builtin_nanf("");
    }
};

}  // namespace

#include "packed_kernels.h"

const edgellm::Kernels edgellm::kAvx2 = {"AVX2", round_rows, multiply};
