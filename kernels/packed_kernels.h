// The arithmetic of packed weights, written once for any vector width. Included by one file for each instruction set,
// which defines `V` (a vector of V::kLanes 32-bit lanes) first and compiles with that instruction set's flags.
#pragma once

#include <cmath>
#include <cstring>

#include "packed.h"

namespace {

using namespace edgellm;

constexpr int kParts = kRows / V::kLanes;  // vectors that make up the 16 rows of a group
constexpr int kVector = 4 * V::kLanes;     // bytes of one of them

// What a correction is: `kMinimum` formats add m * (scale * sum of bytes), `kCentre` formats start the integer sum at
// -centre * (sum of bytes).
enum Correction { kMinimum, kCentre };

template <int N> struct Scales {
    typename V::F scale[N];
    typename V::F minimum;
};

inline const uint8_t * part(const uint8_t * p, int i) { return p + i * kVector; }

// Each format says where block `b` of a group lies and how its operands come out of it. `h` is the part of the 16 rows.
inline void low_high(const uint8_t * nibbles, int h, typename V::I * w) {
    for (int j = 0; j < 4; ++j) {
        const typename V::I x = V::load(part(nibbles + 64 * j, h));
        w[j] = V::low_nibble(x);
        w[j + 4] = V::high_nibble(x);
    }
}

inline void add_fifth(const uint8_t * masks, int h, typename V::I * w) {
    for (int o = 0; o < 8; ++o) w[o] = V::add_fifth_bit(w[o], masks + 8 * o, h);
}

// Q4_0, Q4_1, Q5_0, Q5_1: 16 scales, 16 minima, fifth bits, nibbles; not all of them have the parts in the middle.
template <int kBits, bool kHasMinimum> struct FormatBlock {
    static constexpr Correction kCorrection = kHasMinimum ? kMinimum : kCentre;
    static constexpr int kCentreValue = kHasMinimum ? 0 : 1 << (kBits - 1), kScales = 1;
    static constexpr int kMasks = kHasMinimum ? 64 : 32, kNibbles = kMasks + (kBits == 5 ? 64 : 0), kBytes = kNibbles + 256;
    static constexpr bool kWide = false;
    static inline void load(const uint8_t * group, int64_t b, int h, typename V::I * w, Scales<1> & s) {
        const uint8_t * p = group + b * kBytes;
        s.scale[0] = V::halves(p + 2 * V::kLanes * h);
        if constexpr (kHasMinimum) s.minimum = V::halves(p + 32 + 2 * V::kLanes * h);
        low_high(p + kNibbles, h, w);
        if constexpr (kBits == 5) add_fifth(p + kMasks, h, w);
    }
};

struct FormatQ8_0 {
    static constexpr Correction kCorrection = kCentre;
    static constexpr int kCentreValue = V::kSignedWide ? 0 : 128, kScales = 1, kBytes = 544;
    static constexpr bool kWide = true;
    static inline void load(const uint8_t * group, int64_t b, int h, typename V::I * w, Scales<1> & s) {
        const uint8_t * p = group + b * kBytes;
        s.scale[0] = V::halves(p + 2 * V::kLanes * h);
        for (int o = 0; o < 8; ++o) w[o] = V::load(part(p + 32 + 64 * o, h));
    }
};

// A super-block of Q4_K: 16 scales, 16 minima (halves), then eight blocks of 16 + 16 six-bit factors and nibbles.
template <int kBits> struct FormatK {
    static constexpr Correction kCorrection = kMinimum;
    static constexpr int kCentreValue = 0, kScales = 1;
    static constexpr int kSub = 32 + (kBits == 5 ? 64 : 0) + 256, kBytes = 64 + 8 * kSub;
    static constexpr bool kWide = false;
    static inline void load(const uint8_t * group, int64_t b, int h, typename V::I * w, Scales<1> & s) {
        const uint8_t * p = group + (b >> 3) * kBytes;
        const uint8_t * q = p + 64 + (b & 7) * kSub;
        s.scale[0] = V::mul(V::halves(p + 2 * V::kLanes * h), V::bytes(q + V::kLanes * h));
        s.minimum = V::neg(V::mul(V::halves(p + 32 + 2 * V::kLanes * h), V::bytes(q + 16 + V::kLanes * h)));
        low_high(q + 32 + (kBits == 5 ? 64 : 0), h, w);
        if constexpr (kBits == 5) add_fifth(q + 32, h, w);
    }
};

// A super-block of Q6_K: 16 scales (halves), then eight blocks of 2 x 16 signed factors (one for each 16 columns),
// nibbles, and upper pairs.
struct FormatQ6_K {
    static constexpr Correction kCorrection = kCentre;
    static constexpr int kCentreValue = 32, kScales = 2;
    static constexpr int kSub = 32 + 256 + 128, kBytes = 32 + 8 * kSub;
    static constexpr bool kWide = false;
    static inline void load(const uint8_t * group, int64_t b, int h, typename V::I * w, Scales<2> & s) {
        const uint8_t * p = group + (b >> 3) * kBytes;
        const uint8_t * q = p + 32 + (b & 7) * kSub;
        const typename V::F d = V::halves(p + 2 * V::kLanes * h);
        s.scale[0] = V::mul(d, V::signed_bytes(q + V::kLanes * h));
        s.scale[1] = V::mul(d, V::signed_bytes(q + 16 + V::kLanes * h));
        low_high(q + 32, h, w);
        for (int i = 0; i < 2; ++i) {
            const typename V::I x = V::load(part(q + 288 + 64 * i, h));
            w[4 * i + 0] = V::template add_pair<0>(w[4 * i + 0], x);
            w[4 * i + 1] = V::template add_pair<1>(w[4 * i + 1], x);
            w[4 * i + 2] = V::template add_pair<2>(w[4 * i + 2], x);
            w[4 * i + 3] = V::template add_pair<3>(w[4 * i + 3], x);
        }
    }
};

// Bytes of one block of a tile of n rows: see activation_bytes.
template <class Format> constexpr size_t tile_block(int n) { return static_cast<size_t>(n) * (kBlock + 4 + 4 * Format::kScales); }

template <class Format, int N>
void multiply_tile(int64_t columns, const uint8_t * group, const uint8_t * tile, float * const * out) {
    const int64_t blocks = columns / kBlock;
    for (int h = 0; h < kParts; ++h) {
        typename V::F sum[N];
        for (int i = 0; i < N; ++i) sum[i] = V::zero();
        const uint8_t * a = tile;
        for (int64_t b = 0; b < blocks; ++b, a += tile_block<Format>(N)) {
            typename V::I w[8];
            Scales<Format::kScales> s;
            Format::load(group, b, h, w, s);
            const uint8_t * scales = a + N * kBlock;
            const uint8_t * corrections = scales + 4 * N;
#pragma GCC unroll 16
            for (int i = 0; i < N; ++i) {
                const typename V::F scale = V::broadcast_f(scales + 4 * i);
                constexpr int kOperands = 8 / Format::kScales;
#pragma GCC unroll 2
                for (int k = 0; k < Format::kScales; ++k) {
                    typename V::I dot;
                    if constexpr (Format::kCorrection == kCentre && Format::kCentreValue != 0)
                        dot = V::broadcast_i(corrections + 4 * (Format::kScales * i + k));
                    else
                        dot = V::zero_i();
#pragma GCC unroll 8
                    for (int o = 0; o < kOperands; ++o)
                        dot = V::template dot<Format::kWide>(dot, w[k * kOperands + o], a + kBlock * i + 4 * (k * kOperands + o));
                    sum[i] = V::fma(V::to_float(dot), V::mul(scale, s.scale[k]), sum[i]);
                }
                if constexpr (Format::kCorrection == kMinimum)
                    sum[i] = V::fma(s.minimum, V::broadcast_f(corrections + 4 * i), sum[i]);
            }
        }
        for (int i = 0; i < N; ++i) V::store(out[i] + V::kLanes * h, sum[i]);
    }
}

template <class Format>
void multiply_format(int64_t columns, int n, const uint8_t * g, const uint8_t * t, float * const * out) {
    switch (n) {
        case 1: return multiply_tile<Format, 1>(columns, g, t, out);
        case 2: return multiply_tile<Format, 2>(columns, g, t, out);
        case 3: return multiply_tile<Format, 3>(columns, g, t, out);
        case 4: return multiply_tile<Format, 4>(columns, g, t, out);
        case 5: return multiply_tile<Format, 5>(columns, g, t, out);
        case 6: return multiply_tile<Format, 6>(columns, g, t, out);
        case 7: return multiply_tile<Format, 7>(columns, g, t, out);
        case 8: return multiply_tile<Format, 8>(columns, g, t, out);
        default: return multiply_tile<Format, 16>(columns, g, t, out);
    }
}

template <class Format>
void round_format(int n, const float * const * rows, uint8_t * tile, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
        uint8_t * a = tile + b * tile_block<Format>(n);
        uint8_t * scales = a + n * kBlock;
        uint8_t * corrections = scales + 4 * n;
        for (int i = 0; i < n; ++i) {
            int32_t sums[2];  // of the bytes of each half of the block
            const float scale = V::round_block(rows[i] + b * kBlock, reinterpret_cast<int8_t *>(a + i * kBlock), sums);
            std::memcpy(scales + 4 * i, &scale, 4);
            if constexpr (Format::kCorrection == kMinimum) {
                const float weighted = scale * static_cast<float>(sums[0] + sums[1]);
                std::memcpy(corrections + 4 * i, &weighted, 4);
            } else if constexpr (Format::kScales == 2) {
                const int32_t start[2] = {-Format::kCentreValue * sums[0], -Format::kCentreValue * sums[1]};
                std::memcpy(corrections + 8 * i, start, 8);
            } else {
                const int32_t start = -Format::kCentreValue * (sums[0] + sums[1]);
                std::memcpy(corrections + 4 * i, &start, 4);
            }
        }
    }
}

// Calls f with the format of `type`.
template <class F> void with_format(int32_t type, F && f) {
    switch (type) {
        case Q4_0: return f(FormatBlock<4, false>{});
        case Q4_1: return f(FormatBlock<4, true>{});
        case Q5_0: return f(FormatBlock<5, false>{});
        case Q5_1: return f(FormatBlock<5, true>{});
        case Q8_0: return f(FormatQ8_0{});
        case Q4_K: return f(FormatK<4>{});
        case Q5_K: return f(FormatK<5>{});
        case Q6_K: return f(FormatQ6_K{});
    }
}

void round_rows(int32_t type, int64_t, int n, const float * const * rows, void * tile, int64_t first, int64_t last) {
    with_format(type, [&](auto format) {
        round_format<decltype(format)>(n, rows, static_cast<uint8_t *>(tile), first, last);
    });
}

void multiply(int32_t type, int64_t columns, int n, const void * group, const void * tile, float * const * out) {
    with_format(type, [&](auto format) {
        multiply_format<decltype(format)>(
            columns, n, static_cast<const uint8_t *>(group), static_cast<const uint8_t *>(tile), out);
    });
}

}  // namespace
