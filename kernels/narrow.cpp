// Narrow weights: the types, and narrowing. See narrow.h.
#include "narrow.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "block_parts.h"
#include "narrow_table.h"
#include "packed.h"

namespace edgellm {
namespace {

constexpr int32_t IQ4_NL = 20, MXFP4 = 39;

constexpr CodedType kTypes[] = {
    {Q4_0, 4, 32, 18, 0, 2},     {Q4_1, 4, 32, 20, 0, 4},     {Q5_0, 5, 32, 22, 0, 2},     {Q5_1, 5, 32, 24, 0, 4},
    {Q8_0, 8, 32, 34, 0, 2},     {Q4_K, 4, 256, 144, 0, 16},  {Q5_K, 5, 256, 176, 0, 16},  {Q6_K, 6, 256, 210, 192, 18},
    {IQ4_NL, 4, 32, 18, 0, 2},   {MXFP4, 4, 32, 17, 0, 1},
};

// ggml's kvalues: the numbers that codes stand for.
constexpr int8_t kIq4Nl[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kFp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// The number that a code stands for: a weight is scale * number + offset.
int value_of(int32_t type, int code) {
    switch (type) {
        case Q4_0: return code - 8;
        case Q5_0: return code - 16;
        case Q6_K: return code - 32;
        case Q8_0: return code < 128 ? code : code - 256;
        case IQ4_NL: return kIq4Nl[code];
        case MXFP4: return kFp4[code];
        default: return code;
    }
}

// The scales and offsets of a block, each of `each` columns.
struct Factors {
    int each;
    double scale[16], offset[16];
};

Factors factors_of(const CodedType & type, const uint8_t * block) {
    Factors f{32, {}, {}};
    if (type.type == MXFP4) {
        f.scale[0] = std::ldexp(1.0, block[0] - 128);  // of numbers that are twice what the format says
    } else if (type.type == Q6_K) {
        f.each = 16;
        const double d = half_to_float(block + 208);
        for (int j = 0; j < 16; ++j) f.scale[j] = d * static_cast<int8_t>(block[192 + j]);
    } else if (type.columns == 256) {
        const double d = half_to_float(block), m = half_to_float(block + 2);
        for (int j = 0; j < 8; ++j) {
            f.scale[j] = d * k_scale(block + 4, j);
            f.offset[j] = -m * k_minimum(block + 4, j);
        }
    } else {
        f.scale[0] = half_to_float(block);
        if (type.kept_bytes == 4) f.offset[0] = half_to_float(block + 2);
    }
    return f;
}

void nibbles_of(const uint8_t * p, int each, uint8_t * low, uint8_t * high) {
    for (int i = 0; i < each; ++i) {
        low[i] = p[i] & 15;
        high[i] = p[i] >> 4;
    }
}

// A block's codes, in the order of its columns.
void codes_of(const CodedType & type, const uint8_t * block, uint8_t * codes) {
    const uint8_t * coded = block + (type.kept_at == 0 ? type.kept_bytes : 0);
    if (type.bits == 8) {
        std::memcpy(codes, coded, 32);
    } else if (type.columns == 32) {
        nibbles_of(coded + (type.bits == 5 ? 4 : 0), 16, codes, codes + 16);
        if (type.bits == 5)
            for (int i = 0; i < 32; ++i) codes[i] |= static_cast<uint8_t>(((coded[i / 8] >> (i % 8)) & 1) << 4);
    } else if (type.bits == 6) {
        for (int half = 0; half < 2; ++half)
            for (int k = 0; k < 2; ++k)
                nibbles_of(coded + 64 * half + 32 * k, 32, codes + 128 * half + 32 * k, codes + 128 * half + 64 + 32 * k);
        for (int i = 0; i < 256; ++i)
            codes[i] |= static_cast<uint8_t>(((coded[128 + 32 * (i / 128) + i % 32] >> (2 * (i / 32 % 4))) & 3) << 4);
    } else {
        const uint8_t * nibbles = coded + (type.bits == 5 ? 32 : 0);
        for (int j = 0; j < 4; ++j) nibbles_of(nibbles + 32 * j, 32, codes + 64 * j, codes + 64 * j + 32);
        if (type.bits == 5)
            for (int i = 0; i < 256; ++i) codes[i] |= static_cast<uint8_t>(((coded[i % 32] >> (i / 32)) & 1) << 4);
    }
}

// What a matrix is made of: for each code the sum of its scales' squares, and the sum of the squared weights.
struct Census {
    std::vector<double> weight;
    double norm = 0;
};

Census census_of(const CodedType & type, int64_t blocks, const uint8_t * source) {
    constexpr int kLanes = 4;  // neighbours often have the same code, and would wait for each other
    const size_t n = size_t{1} << type.bits;
    std::vector<double> sums(kLanes * n);
    Census census{std::vector<double>(n), 0};
    int16_t value[256];
    for (size_t code = 0; code < n; ++code) value[code] = static_cast<int16_t>(value_of(type.type, static_cast<int>(code)));
    uint8_t codes[256];
    for (int64_t b = 0; b < blocks; ++b, source += type.bytes) {
        codes_of(type, source, codes);
        const Factors f = factors_of(type, source);
        for (int j = 0; j * f.each < type.columns; ++j) {
            const double scale = f.scale[j], offset = f.offset[j], square = scale * scale;
            if (!std::isfinite(square) || !std::isfinite(offset)) continue;
            int32_t sum = 0, squares = 0;
            for (int i = 0; i < f.each; ++i) {
                const uint8_t code = codes[j * f.each + i];
                sums[static_cast<size_t>(i % kLanes) * n + code] += square;
                sum += value[code];
                squares += value[code] * value[code];
            }
            census.norm += square * squares + 2 * scale * offset * sum + offset * offset * f.each;
        }
    }
    for (size_t i = 0; i < sums.size(); ++i) census.weight[i % n] += sums[i];
    return census;
}

struct Fitted {
    uint8_t table[kTableBytes];  // codes
    uint8_t index[256];          // of every code
    double error;                // squared, of the matrix
};

Fitted fit(const CodedType & type, int bits, const Census & census) {
    const int n = 1 << type.bits, count = 1 << bits;
    std::vector<int> order(static_cast<size_t>(n)), values;
    std::iota(order.begin(), order.end(), 0);
    const auto below = [&](int a, int b) { return value_of(type.type, a) < value_of(type.type, b); };
    std::stable_sort(order.begin(), order.end(), below);
    std::vector<double> weights;
    for (const int code : order) {
        values.push_back(value_of(type.type, code));
        weights.push_back(census.weight[static_cast<size_t>(code)]);
    }
    const std::vector<int> chosen = best_values(values, weights, count);
    Fitted fitted{};
    for (size_t i = 0; i < chosen.size(); ++i)
        fitted.table[i] = static_cast<uint8_t>(order[static_cast<size_t>(chosen[i])]);
    for (int code = 0; code < n; ++code) {
        int best = 0, least = 1 << 20;
        for (int i = 0; i < count; ++i) {
            const int away = value_of(type.type, code) - value_of(type.type, fitted.table[i]);
            if (away * away < least) {
                least = away * away;
                best = i;
            }
        }
        fitted.index[code] = static_cast<uint8_t>(best);
        fitted.error += census.weight[static_cast<size_t>(code)] * least;
    }
    return fitted;
}

// A group's indices into its planes (narrow.h), which hold zeros.
void put_indices(const uint8_t * index, int bits, uint8_t * out) {
    int at = 0;
    if (bits >= 4) {
        for (int i = 0; i < kGroup; ++i) out[i % 128] |= static_cast<uint8_t>((index[i] & 15) << (4 * (i / 128)));
        out += 128, at = 4;
    }
    if (bits == 2 || bits == 3 || bits == 6) {
        for (int i = 0; i < kGroup; ++i) out[i % 64] |= static_cast<uint8_t>(((index[i] >> at) & 3) << (2 * (i / 64)));
        out += 64, at += 2;
    }
    if (bits % 2 == 1)
        for (int i = 0; i < kGroup; ++i) out[i % 32] |= static_cast<uint8_t>(((index[i] >> at) & 1) << (i / 32));
}

size_t index_bytes(int64_t codes, int bits) {
    return static_cast<size_t>((codes + kGroup - 1) / kGroup) * 32 * static_cast<size_t>(bits);
}

}  // namespace

const CodedType * coded_type(int32_t type) {
    for (const CodedType & coded : kTypes)
        if (coded.type == type) return &coded;
    return nullptr;
}

int code_bits(int32_t type) {
    const CodedType * coded = coded_type(type);
    return coded == nullptr ? 0 : coded->bits;
}

bool can_narrow(int32_t type, int bits) { return bits >= kLeastBits && bits <= kMostBits && bits < code_bits(type); }

size_t narrow_size(int32_t type, int64_t columns, int64_t rows, int bits) {
    const CodedType & coded = *coded_type(type);
    const int64_t codes = columns * rows;
    const size_t kept = static_cast<size_t>(codes / coded.columns) * static_cast<size_t>(coded.kept_bytes);
    return kTableBytes + index_bytes(codes, bits) + kept;
}

void narrow(int32_t type, int64_t columns, int64_t rows, int bits, const void * source, void * stored) {
    const CodedType & coded = *coded_type(type);
    const int64_t codes = columns * rows, blocks = codes / coded.columns;
    const uint8_t * from = static_cast<const uint8_t *>(source);
    const Fitted fitted = fit(coded, bits, census_of(coded, blocks, from));
    uint8_t * out = static_cast<uint8_t *>(stored);
    std::memcpy(out, fitted.table, kTableBytes);
    uint8_t * indices = out + kTableBytes;
    uint8_t * kept = indices + index_bytes(codes, bits);
    std::memset(indices, 0, index_bytes(codes, bits));
    uint8_t group[kGroup];
    for (int64_t first = 0; first < codes; first += kGroup, indices += 32 * bits) {
        std::memset(group, 0, sizeof group);
        const int64_t here = std::min<int64_t>(kGroup, codes - first);
        for (int64_t c = 0; c < here; c += coded.columns, from += coded.bytes, kept += coded.kept_bytes) {
            codes_of(coded, from, group + c);
            std::memcpy(kept, from + coded.kept_at, static_cast<size_t>(coded.kept_bytes));
        }
        for (int64_t c = 0; c < here; ++c) group[c] = fitted.index[group[c]];
        put_indices(group, bits, indices);
    }
}

std::vector<double> narrow_errors(int32_t type, int64_t columns, int64_t rows, const std::vector<int> & bits,
                                  const void * source) {
    const CodedType & coded = *coded_type(type);
    const Census census = census_of(coded, columns * rows / coded.columns, static_cast<const uint8_t *>(source));
    std::vector<double> errors;
    for (const int b : bits) errors.push_back(census.norm > 0 ? fit(coded, b, census).error / census.norm : 0);
    return errors;
}

void widen_with(const Wideners & wideners, int32_t type, int64_t columns, int64_t rows, int bits, const void * stored,
                void * source) {
    const uint8_t * table = static_cast<const uint8_t *>(stored);
    const uint8_t * indices = table + kTableBytes;
    const int64_t codes = columns * rows;
    const uint8_t * kept = indices + index_bytes(codes, bits);
    wideners.widen(*coded_type(type), bits, codes, table, indices, kept, static_cast<uint8_t *>(source));
}

void widen(int32_t type, int64_t columns, int64_t rows, int bits, const void * stored, void * source) {
    widen_with(*available_wideners().front(), type, columns, rows, bits, stored, source);
}

const std::vector<const Wideners *> & available_wideners() {
    static const std::vector<const Wideners *> found = [] {
        std::vector<const Wideners *> list;
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx2")) list.push_back(&kWidenAvx2);
#endif
        list.push_back(&kWidenPortable);
        return list;
    }();
    return found;
}

}  // namespace edgellm
