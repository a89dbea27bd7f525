// Packed weights on AVX-512 with VNNI: sixteen rows in one vector.
#include <immintrin.h>

#include <cstdint>

namespace {

struct V {
    using I = __m512i;
    using F = __m512;
    static constexpr int kLanes = 16;
    static constexpr bool kSignedWide = false;

    static inline I load(const void * p) { return _mm512_loadu_si512(p); }
    static inline I zero_i() { return _mm512_setzero_si512(); }
    static inline F zero() { return _mm512_setzero_ps(); }
    static inline I low_nibble(I x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
    static inline I high_nibble(I x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
    static inline I add_fifth_bit(I x, const uint8_t * mask, int) {
        __mmask64 bits;
        __builtin_memcpy(&bits, mask, 8);
        return _mm512_mask_add_epi8(x, bits, x, _mm512_set1_epi8(16));
    }
    template <int J> static inline I add_pair(I x, I pairs) {
        const I moved = J == 0   ? _mm512_slli_epi16(pairs, 4)
                        : J == 1 ? _mm512_slli_epi16(pairs, 2)
                        : J == 2 ? pairs
                                 : _mm512_srli_epi16(pairs, 2);
        return _mm512_ternarylogic_epi64(x, moved, _mm512_set1_epi8(0x30), 0xF8);  // x | (moved & mask)
    }
    static inline F halves(const void * p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i *>(p))); }
    static inline F bytes(const void * p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i *>(p))));
    }
    static inline F signed_bytes(const void * p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i *>(p))));
    }
    static inline F broadcast_f(const void * p) { return _mm512_castsi512_ps(broadcast_i(p)); }
    static inline I broadcast_i(const void * p) {
        int32_t x;
        __builtin_memcpy(&x, p, 4);
        return _mm512_set1_epi32(x);
    }
    template <bool> static inline I dot(I sum, I w, const void * activations) {
        return _mm512_dpbusd_epi32(sum, w, broadcast_i(activations));
    }
    static inline F to_float(I x) { return _mm512_cvtepi32_ps(x); }
    static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static inline F neg(F a) { return _mm512_sub_ps(_mm512_setzero_ps(), a); }
    static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static inline void store(float * p, F x) { _mm512_storeu_ps(p, x); }

    // Rounds 32 floats to bytes; returns the scale, and the sums of the two halves' bytes. The scale of a block that
    // holds a NaN or an infinity is NaN, so that what is computed from it shows it.
    static inline float round_block(const float * x, int8_t * out, int32_t * sums) {
        const F a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
        const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
        const __mmask16 odd = _mm512_fpclass_ps_mask(a, 0x99) | _mm512_fpclass_ps_mask(b, 0x99);
        const float scale = largest / 127.0f;
        const F inverse = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
        const I ia = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse)), ib = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm512_cvtsepi32_epi8(ia));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out + 16), _mm512_cvtsepi32_epi8(ib));
        sums[0] = odd ? 0 : _mm512_reduce_add_epi32(ia);
        sums[1] = odd ? 0 : _mm512_reduce_add_epi32(ib);
        return odd ? __builtin_nanf("") : scale;
    }
};

}  // namespace

#include "packed_kernels.h"

const edgellm::Kernels edgellm::kAvx512 = {"AVX-512 VNNI", round_rows, multiply};
