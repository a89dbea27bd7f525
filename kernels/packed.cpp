// Packed weights: the layout, and the slow reference. See packed.h.
#include "packed.h"

#include <cstring>

#include "block_parts.h"

namespace edgellm {
namespace {

constexpr TypeInfo kTypes[] = {
    {Q4_0, "Q4_0", 32, 18, 288},   {Q4_1, "Q4_1", 32, 20, 320},   {Q5_0, "Q5_0", 32, 22, 352},
    {Q5_1, "Q5_1", 32, 24, 384},   {Q8_0, "Q8_0", 32, 34, 544},   {Q4_K, "Q4_K", 256, 144, 2368},
    {Q5_K, "Q5_K", 256, 176, 2880}, {Q6_K, "Q6_K", 256, 210, 3360},
};

// Where the parts of a row's blocks lie in the file, and in a packed block.
void put_half(uint8_t * packed, int row, const uint8_t * source) { std::memcpy(packed + 2 * row, source, 2); }

// `source`: 16 bytes, column c in the low nibble of byte c, column 16 + c in the high one.
void put_nibbles(uint8_t * packed, int row, const uint8_t * source) {
    for (int j = 0; j < 4; ++j) std::memcpy(packed + 64 * j + 4 * row, source + 4 * j, 4);
}

// `bits`: bit c belongs to column c.
void put_fifth(uint8_t * packed, int row, uint32_t bits) {
    for (int o = 0; o < 8; ++o) {
        const uint8_t four = (bits >> (4 * o)) & 15;
        packed[8 * o + row / 2] |= static_cast<uint8_t>(row % 2 ? four << 4 : four);
    }
}

void pack_block(Type type, const uint8_t * s, uint8_t * p, int row) {
    switch (type) {
        case Q4_0:
            put_half(p, row, s);
            return put_nibbles(p + 32, row, s + 2);
        case Q4_1:
            put_half(p, row, s);
            put_half(p + 32, row, s + 2);
            return put_nibbles(p + 64, row, s + 4);
        case Q5_0:
        case Q5_1: {
            const int extra = type == Q5_1 ? 2 : 0;  // bytes of the minimum
            put_half(p, row, s);
            if (extra) put_half(p + 32, row, s + 2);
            uint32_t bits;
            std::memcpy(&bits, s + 2 + extra, 4);
            put_fifth(p + 32 + 16 * extra, row, bits);
            return put_nibbles(p + 96 + 16 * extra, row, s + 6 + extra);
        }
        case Q8_0:
            put_half(p, row, s);
            for (int o = 0; o < 8; ++o)
                for (int t = 0; t < 4; ++t) p[32 + 64 * o + 4 * row + t] = s[2 + 4 * o + t] ^ 0x80;
            return;
        case Q4_K:
        case Q5_K: {
            const int fifth = type == Q5_K ? 64 : 0;
            const uint8_t *factors = s + 4, *high = s + 16, *nibbles = s + 16 + (fifth ? 32 : 0);
            put_half(p, row, s);
            put_half(p + 32, row, s + 2);
            for (int j = 0; j < 8; ++j) {
                uint8_t * q = p + 64 + j * (32 + fifth + 256);
                q[row] = k_scale(factors, j);
                q[16 + row] = k_minimum(factors, j);
                uint8_t rearranged[16];
                for (int c = 0; c < 16; ++c) {
                    const uint8_t a = nibbles[32 * (j / 2) + c], b = nibbles[32 * (j / 2) + 16 + c];
                    rearranged[c] = j % 2 ? (a >> 4) | (b & 0xF0) : (a & 15) | static_cast<uint8_t>(b << 4);
                }
                if (fifth) {
                    uint32_t bits = 0;
                    for (int c = 0; c < 32; ++c) bits |= static_cast<uint32_t>((high[c] >> j) & 1) << c;
                    put_fifth(q + 32, row, bits);
                }
                put_nibbles(q + 32 + fifth, row, rearranged);
            }
            return;
        }
        case Q6_K: {
            uint8_t value[256];  // six bits each
            for (int part = 0; part < 8; ++part) {  // of 32 columns; four parts share the bytes of their upper bits
                const int k = part % 4;
                const uint8_t *low = s + 64 * (part / 4) + 32 * (k & 1), *high = s + 128 + 32 * (part / 4);
                for (int c = 0; c < 32; ++c)
                    value[32 * part + c] = static_cast<uint8_t>(((low[c] >> (k < 2 ? 0 : 4)) & 15) | (((high[c] >> (2 * k)) & 3) << 4));
            }
            put_half(p, row, s + 208);
            for (int j = 0; j < 8; ++j) {
                uint8_t * q = p + 32 + j * 416;
                q[row] = s[192 + 2 * j];
                q[16 + row] = s[192 + 2 * j + 1];
                uint32_t operands[8];
                std::memcpy(operands, value + 32 * j, 32);
                for (int o = 0; o < 4; ++o) {
                    const uint32_t nibbles = (operands[o] & 0x0F0F0F0FU) | ((operands[o + 4] & 0x0F0F0F0FU) << 4);
                    std::memcpy(q + 32 + 64 * o + 4 * row, &nibbles, 4);
                }
                for (int i = 0; i < 2; ++i) {
                    uint32_t pairs = 0;
                    for (int o = 0; o < 4; ++o) pairs |= ((operands[4 * i + o] >> 4) & 0x03030303U) << (2 * o);
                    std::memcpy(q + 288 + 64 * i + 4 * row, &pairs, 4);
                }
            }
            return;
        }
    }
}

int nibble_at(const uint8_t * nibbles, int row, int column) {
    const int o = column / 4;
    const uint8_t byte = nibbles[64 * (o % 4) + 4 * row + column % 4];
    return o < 4 ? byte & 15 : byte >> 4;
}

int fifth_at(const uint8_t * masks, int row, int column) {
    const int bit = 4 * row + column % 4;
    return ((masks[8 * (column / 4) + bit / 8] >> (bit % 8)) & 1) << 4;
}

// Columns [32 b, 32 b + 32) of a row.
void unpack_block(Type type, const uint8_t * group, int64_t b, int row, float * out) {
    const int super = static_cast<int>(b % 8);
    switch (type) {
        case Q4_0: {
            const uint8_t * p = group + 288 * b;
            for (int c = 0; c < 32; ++c) out[c] = half_to_float(p + 2 * row) * static_cast<float>(nibble_at(p + 32, row, c) - 8);
            return;
        }
        case Q4_1: {
            const uint8_t * p = group + 320 * b;
            const float d = half_to_float(p + 2 * row), m = half_to_float(p + 32 + 2 * row);
            for (int c = 0; c < 32; ++c) out[c] = d * static_cast<float>(nibble_at(p + 64, row, c)) + m;
            return;
        }
        case Q5_0: {
            const uint8_t * p = group + 352 * b;
            const float d = half_to_float(p + 2 * row);
            for (int c = 0; c < 32; ++c)
                out[c] = d * static_cast<float>((nibble_at(p + 96, row, c) | fifth_at(p + 32, row, c)) - 16);
            return;
        }
        case Q5_1: {
            const uint8_t * p = group + 384 * b;
            const float d = half_to_float(p + 2 * row), m = half_to_float(p + 32 + 2 * row);
            for (int c = 0; c < 32; ++c)
                out[c] = d * static_cast<float>(nibble_at(p + 128, row, c) | fifth_at(p + 64, row, c)) + m;
            return;
        }
        case Q8_0: {
            const uint8_t * p = group + 544 * b;
            const float d = half_to_float(p + 2 * row);
            for (int c = 0; c < 32; ++c)
                out[c] = d * static_cast<float>(p[32 + 64 * (c / 4) + 4 * row + c % 4] - 128);
            return;
        }
        case Q4_K:
        case Q5_K: {
            const int fifth = type == Q5_K ? 64 : 0, sub = 288 + fifth;
            const uint8_t * p = group + (64 + 8 * sub) * (b / 8);
            const uint8_t * q = p + 64 + sub * super;
            const float d = half_to_float(p + 2 * row) * q[row], m = half_to_float(p + 32 + 2 * row) * q[16 + row];
            for (int c = 0; c < 32; ++c) {
                const int v = nibble_at(q + 32 + fifth, row, c) | (fifth ? fifth_at(q + 32, row, c) : 0);
                out[c] = d * static_cast<float>(v) - m;
            }
            return;
        }
        case Q6_K: {
            const uint8_t * p = group + 3360 * (b / 8);
            const uint8_t * q = p + 32 + 416 * super;
            for (int c = 0; c < 32; ++c) {
                const int o = c / 4;
                const int pair = (q[288 + 64 * (o / 4) + 4 * row + c % 4] >> (2 * (o % 4))) & 3;
                const float d = half_to_float(p + 2 * row) * static_cast<int8_t>(q[(c < 16 ? 0 : 16) + row]);
                out[c] = d * static_cast<float>((nibble_at(q + 32, row, c) | pair << 4) - 32);
            }
            return;
        }
    }
}

}  // namespace

const TypeInfo * type_info(int32_t type) {
    for (const TypeInfo & info : kTypes)
        if (info.type == type) return &info;
    return nullptr;
}

bool can_pack(int32_t type, int64_t columns, int64_t rows) {
    const TypeInfo * info = type_info(type);
    return info != nullptr && columns > 0 && rows > 0 && columns % info->source_columns == 0 && rows % kRows == 0;
}

size_t packed_size(int32_t type, int64_t columns, int64_t rows) {
    const TypeInfo * info = type_info(type);
    return static_cast<size_t>(rows / kRows) * static_cast<size_t>(columns / info->source_columns) *
           static_cast<size_t>(info->packed_bytes);
}

void pack(int32_t type, int64_t columns, int64_t rows, const void * source, void * packed) {
    const TypeInfo & info = *type_info(type);
    const int64_t blocks = columns / info.source_columns;
    const uint8_t * s = static_cast<const uint8_t *>(source);
    uint8_t * p = static_cast<uint8_t *>(packed);
    for (int64_t group = 0; group < rows / kRows; ++group)
        for (int64_t b = 0; b < blocks; ++b, p += info.packed_bytes) {
            std::memset(p, 0, static_cast<size_t>(info.packed_bytes));
            for (int row = 0; row < kRows; ++row)
                pack_block(info.type, s + ((group * kRows + row) * blocks + b) * info.source_bytes, p, row);
        }
}

void unpack_row(int32_t type, int64_t columns, const void * packed, int64_t row, float * out) {
    const size_t group = packed_size(type, columns, kRows);
    const uint8_t * p = static_cast<const uint8_t *>(packed) + static_cast<size_t>(row / kRows) * group;
    for (int64_t b = 0; b < columns / kBlock; ++b)
        unpack_block(static_cast<Type>(type), p, b, static_cast<int>(row % kRows), out + kBlock * b);
}

size_t activation_bytes(int32_t type, int64_t columns) {
    return static_cast<size_t>(columns / kBlock) * (kBlock + 4 + (type == Q6_K ? 8 : 4));
}

std::vector<const Kernels *> available_kernels() {
    std::vector<const Kernels *> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        found.push_back(&kAvx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        found.push_back(&kAvx2);
#endif
    return found;
}

std::vector<TypeInfo> packable_types() { return {std::begin(kTypes), std::end(kTypes)}; }

}  // namespace edgellm
