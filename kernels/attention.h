// Attention of a few rows over the cells of a KV cache, in parts that do not depend on how many rows or threads there are.
//
// A row's result is the same, to the last bit, whatever else the step holds, and wherever its cells lie: those it sees are
// taken in order, in blocks of 64 and parts of 256, and the parts are put together in order. Keys and values are expanded
// once for all heads that share them, and for rows that see the same.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgellm {

constexpr int64_t kBlockCells = 64;
constexpr int64_t kPartCells = 256;
constexpr int64_t kMostWidth = 256;  // of a head's keys, and of its values

struct Attention {
    int64_t rows, heads, kv_heads, cells;  // rows of the step; heads share keys and values in equal groups
    int64_t key_width, value_width;        // multiples of 8, at most kMostWidth
    const char * query;                    // floats
    size_t query_row, query_head;          // strides in bytes
    const char *keys, *values;             // 16-bit floats
    size_t key_cell, key_head, value_cell, value_head;
    const char * mask;  // 16-bit floats, one for each cell of a row: added to the score; minus infinity hides the cell
    size_t mask_row;
    float scale;
    float * result;  // (rows, heads, value width)
    float * parts;   // part_floats() of these
    int32_t * seen;  // (rows, cells + 1): how many cells a row sees, and which; `look` finds them
};

inline int64_t part_count(const Attention & of) { return (of.cells + kPartCells - 1) / kPartCells; }

inline int64_t part_floats(const Attention & of) { return part_count(of) * of.rows * of.heads * (of.value_width + 2); }

inline int64_t seen_numbers(const Attention & of) { return of.rows * (of.cells + 1); }

struct AttentionKernels {
    // Which cells rows [first, last) see. All rows come before all parts.
    void (*look)(const Attention & of, int64_t first, int64_t last);
    // Part `part` of the cells that each row sees, for all rows, of the heads that share key and value head `kv_head`.
    void (*part)(const Attention & of, int64_t kv_head, int64_t part);
    // Puts the parts of rows x heads [first, last) together.
    void (*gather)(const Attention & of, int64_t first, int64_t last);
};

extern const AttentionKernels kAttentionAvx2;

}  // namespace edgellm
