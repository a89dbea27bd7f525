// Widening, written once for any instruction set. Included by one file for each, which defines `V` (vectors of 32 bytes)
// first and compiles with that instruction set's flags. narrow.h has the layout.
#pragma once

#include <cstring>
#include <utility>

#include "narrow.h"

namespace {

using namespace edgellm;

// The indices of codes [32 kPart, 32 kPart + 32) of a group.
template <int kBits, int kPart> inline typename V::I indices(const uint8_t * p) {
    constexpr bool kNibbles = kBits >= 4, kPairs = kBits == 2 || kBits == 3 || kBits == 6;
    constexpr int kPairsAt = kNibbles ? 128 : 0, kSinglesAt = kPairsAt + (kPairs ? 64 : 0);
    typename V::I x = V::zero();
    if constexpr (kNibbles) x = V::template bits<4 * (kPart / 4), 15>(V::load(p + 32 * (kPart % 4)));
    if constexpr (kPairs) {
        const typename V::I y = V::template bits<2 * (kPart / 2), 3>(V::load(p + kPairsAt + 32 * (kPart % 2)));
        x = kNibbles ? V::either(x, V::template up<4>(y)) : y;
    }
    if constexpr (kBits % 2 == 1) {
        const typename V::I y = V::template bits<kPart, 1>(V::load(p + kSinglesAt));
        x = V::either(x, V::template up<kBits - 1>(y));
    }
    return x;
}

// Each format says how `kBlocks` blocks are made of the codes of a group and of the parts that are kept.
// Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, MXFP4: what is kept, fifth bits, nibbles (columns c and 16 + c in one byte).
template <int kKept, bool kFifth> struct Blocks {
    static constexpr int kBlocks = 8, kKeptBytes = kKept, kBytes = kKept + (kFifth ? 4 : 0) + 16;
    static inline void put(const typename V::I * c, const uint8_t * kept, uint8_t * out) {
        for (int k = 0; k < 8; ++k, kept += kKept, out += kBytes) {
            std::memcpy(out, kept, kKept);
            if constexpr (kFifth) {
                const uint32_t fifth = V::template mask<4>(c[k]);
                std::memcpy(out + kKept, &fifth, 4);
            }
            V::store_nibbles(out + kBytes - 16, kFifth ? V::template bits<0, 15>(c[k]) : c[k]);
        }
    }
};

struct BlocksQ8 {
    static constexpr int kBlocks = 8, kKeptBytes = 2, kBytes = 34;
    static inline void put(const typename V::I * c, const uint8_t * kept, uint8_t * out) {
        for (int k = 0; k < 8; ++k, kept += 2, out += 34) {
            std::memcpy(out, kept, 2);
            V::store(out + 2, c[k]);
        }
    }
};

// Q4_K, Q5_K: what is kept, fifth bits (bit j of byte i: column 32 j + i), nibbles (columns 64 j + i and 64 j + 32 + i).
template <bool kFifth> struct BlocksK {
    static constexpr int kBlocks = 1, kKeptBytes = 16, kBytes = 144 + (kFifth ? 32 : 0);
    static inline void put(const typename V::I * c, const uint8_t * kept, uint8_t * out) {
        std::memcpy(out, kept, 16);
        uint8_t * nibbles = out + kBytes - 128;
        for (int j = 0; j < 4; ++j) {
            const typename V::I low = kFifth ? V::template bits<0, 15>(c[2 * j]) : c[2 * j];
            const typename V::I high = kFifth ? V::template bits<0, 15>(c[2 * j + 1]) : c[2 * j + 1];
            V::store(nibbles + 32 * j, V::either(low, V::template up<4>(high)));
        }
        if constexpr (kFifth) V::store(out + 16, fifths(c, std::make_integer_sequence<int, 8>()));
    }
    template <int... j> static inline typename V::I fifths(const typename V::I * c, std::integer_sequence<int, j...>) {
        typename V::I all = V::zero();
        ((all = V::either(all, V::template up<j>(V::template bits<4, 1>(c[j])))), ...);
        return all;
    }
};

// Q6_K: nibbles, upper pairs, what is kept; see ggml's dequantize_row_q6_K.
struct BlocksQ6K {
    static constexpr int kBlocks = 1, kKeptBytes = 18, kBytes = 210;
    static inline void put(const typename V::I * c, const uint8_t * kept, uint8_t * out) {
        for (int half = 0; half < 2; ++half, c += 4) {
            for (int k = 0; k < 2; ++k) {
                const typename V::I high = V::template up<4>(V::template bits<0, 15>(c[k + 2]));
                V::store(out + 64 * half + 32 * k, V::either(V::template bits<0, 15>(c[k]), high));
            }
            const typename V::I a = V::either(V::template bits<4, 3>(c[0]), V::template up<2>(V::template bits<4, 3>(c[1])));
            const typename V::I b = V::either(V::template bits<4, 3>(c[2]), V::template up<2>(V::template bits<4, 3>(c[3])));
            V::store(out + 128 + 32 * half, V::either(a, V::template up<4>(b)));
        }
        std::memcpy(out + 192, kept, 18);
    }
};

template <class F, int kBits, int... kParts>
inline void put_group(const typename V::Table & table, const uint8_t * from, const uint8_t * kept, uint8_t * out,
                      std::integer_sequence<int, kParts...>) {
    const typename V::I codes[8] = {V::template look_up<kBits>(table, indices<kBits, kParts>(from))...};
    F::put(codes, kept, out);
}

template <class F, int kBits>
void widen_groups(int64_t codes, const uint8_t * table_bytes, const uint8_t * from, const uint8_t * kept, uint8_t * out) {
    constexpr auto kParts = std::make_integer_sequence<int, 8>();
    const typename V::Table table(table_bytes);
    for (; codes >= kGroup; codes -= kGroup) {
        put_group<F, kBits>(table, from, kept, out, kParts);
        from += 32 * kBits;
        kept += F::kBlocks * F::kKeptBytes;
        out += F::kBlocks * F::kBytes;
    }
    if constexpr (F::kBlocks > 1) {
        if (codes == 0) return;
        // A group that is not full goes by way of a buffer: there is no room for a whole one.
        const size_t blocks = static_cast<size_t>(codes) / 32;
        uint8_t kept_group[F::kBlocks * F::kKeptBytes] = {}, out_group[F::kBlocks * F::kBytes];
        std::memcpy(kept_group, kept, blocks * F::kKeptBytes);
        put_group<F, kBits>(table, from, kept_group, out_group, kParts);
        std::memcpy(out, out_group, blocks * F::kBytes);
    }
}

template <class F, int kCodeBits>
void widen_format(int bits, int64_t codes, const uint8_t * table, const uint8_t * from, const uint8_t * kept, uint8_t * out) {
    if (bits == 2) return widen_groups<F, 2>(codes, table, from, kept, out);
    if (bits == 3) return widen_groups<F, 3>(codes, table, from, kept, out);
    if constexpr (kCodeBits > 4)
        if (bits == 4) return widen_groups<F, 4>(codes, table, from, kept, out);
    if constexpr (kCodeBits > 5)
        if (bits == 5) return widen_groups<F, 5>(codes, table, from, kept, out);
    if constexpr (kCodeBits > 6)
        if (bits == 6) return widen_groups<F, 6>(codes, table, from, kept, out);
}

void widen_type(const CodedType & type, int bits, int64_t codes, const uint8_t * table, const uint8_t * from,
                const uint8_t * kept, uint8_t * out) {
    // Codes of another type would spill into their neighbours.
    uint8_t own[kTableBytes];
    for (int i = 0; i < kTableBytes; ++i) own[i] = table[i] & static_cast<uint8_t>((1 << type.bits) - 1);
    const bool super = type.columns == 256;
    switch (type.bits) {
        case 4:
            if (super) return widen_format<BlocksK<false>, 4>(bits, codes, own, from, kept, out);
            if (type.kept_bytes == 1) return widen_format<Blocks<1, false>, 4>(bits, codes, own, from, kept, out);
            if (type.kept_bytes == 2) return widen_format<Blocks<2, false>, 4>(bits, codes, own, from, kept, out);
            return widen_format<Blocks<4, false>, 4>(bits, codes, own, from, kept, out);
        case 5:
            if (super) return widen_format<BlocksK<true>, 5>(bits, codes, own, from, kept, out);
            if (type.kept_bytes == 2) return widen_format<Blocks<2, true>, 5>(bits, codes, own, from, kept, out);
            return widen_format<Blocks<4, true>, 5>(bits, codes, own, from, kept, out);
        case 6: return widen_format<BlocksQ6K, 6>(bits, codes, own, from, kept, out);
        default: return widen_format<BlocksQ8, 8>(bits, codes, own, from, kept, out);
    }
}

}  // namespace
