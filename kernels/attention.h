// Attention of a few rows over the cells of a KV cache, in parts that do not depend on how many rows or threads there are.
//
// A row's result is the same, to the last bit, whatever else the step holds: its cells are taken in blocks of 64 and
// parts of 256, counted from the first cell, and the parts are put together in order. Keys and values are expanded once
// for all rows and for all heads that share them.
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
};

inline int64_t part_count(const Attention & of) { return (of.cells + kPartCells - 1) / kPartCells; }

inline int64_t part_floats(const Attention & of) { return part_count(of) * of.rows * of.heads * (of.value_width + 2); }

struct AttentionKernels {
    // Part `part` of the cells, for all rows, of the heads that share key and value head `kv_head`.
    void (*part)(const Attention & of, int64_t kv_head, int64_t part);
    // Puts the parts of rows x heads [first, last) together.
    void (*gather)(const Attention & of, int64_t first, int64_t last);
};

extern const AttentionKernels kAttentionAvx2;

}  // namespace edgellm
