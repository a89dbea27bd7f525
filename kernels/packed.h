// Packed weights: quantised matrices rearranged for vector dot products of bytes.
//
// A GGUF matrix of N rows and K columns is cut into groups of 16 rows, and each group into blocks of 32 columns. In a
// block the bytes of the 16 rows are interleaved four columns at a time, so that one 64-byte load is one operand of a
// vector dot product for 16 rows at once ("operand o" stands for columns 4o .. 4o+3, o = 0 .. 7):
//
//   operand bytes    row 0: 4 columns | row 1: 4 columns | ... | row 15: 4 columns
//
//   nibbles (256 B)  four vectors; vector j holds operand j in its low and operand j + 4 in its high nibbles
//   fifth bits (64)  eight 64-bit masks, one for each operand
//   upper pairs(128) two vectors; vector i holds the upper two bits of operands 4i .. 4i+3, operand 4i lowest
//   bytes (512 B)    eight vectors
//
// Nothing is rounded: `unpack_row` gives what ggml's own dequantisation gives. Activations are rounded to signed bytes
// with one scale for each 32 of them, as llama.cpp does for its block formats; sums of products are exact in 32 bits
// and are added up in the order of the columns, so a row's result does not depend on how many others are computed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace edgellm {

constexpr int kRows = 16;     // rows in a group
constexpr int kBlock = 32;    // columns in a block
constexpr int kMaxTile = 16;  // activation rows that are multiplied together

// ggml's numbers of tensor types.
enum Type : int32_t { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 };

struct TypeInfo {
    Type type;
    const char * name;
    int source_columns;  // columns in one block of the file
    int source_bytes;    // bytes of such a block
    int packed_bytes;    // bytes of 16 rows of as many columns, packed
};

// nullptr for a type that is not packed.
const TypeInfo * type_info(int32_t type);

// Whether a matrix of this type and shape can be packed.
bool can_pack(int32_t type, int64_t columns, int64_t rows);

// Bytes of a packed matrix.
size_t packed_size(int32_t type, int64_t columns, int64_t rows);

// Rearranges `rows` rows as they stand in a GGUF file. `rows` is a multiple of 16.
void pack(int32_t type, int64_t columns, int64_t rows, const void * source, void * packed);

// One row as floats: the slow reference, and what an embedding look-up needs.
void unpack_row(int32_t type, int64_t columns, const void * packed, int64_t row, float * out);

// Activations, rounded. For each tile of up to 16 rows and each block: the bytes of the rows (32 each), their scales
// (float), and one or two corrections (packed_kernels.h). A tile of `n` rows takes n * activation_bytes().
size_t activation_bytes(int32_t type, int64_t columns);

// Sizes of the tiles that `n` rows are cut into: as many sixteens as there are, an eight, the rest.
inline int next_tile(int64_t n) { return n >= 16 ? 16 : n >= 8 ? 8 : static_cast<int>(n); }

// The same functions for each instruction set.
struct Kernels {
    const char * name;
    // Rounds blocks [first, last) of a tile of `n` rows; rows[i] points at `columns` floats.
    void (*round)(int32_t type, int64_t columns, int n, const float * const * rows, void * tile, int64_t first, int64_t last);
    // Multiplies one group by one tile: out[i][0 .. 15] for each of the tile's `n` rows.
    void (*multiply)(int32_t type, int64_t columns, int n, const void * group, const void * tile, float * const * out);
};

extern const Kernels kAvx512;
extern const Kernels kAvx2;

// Those that this processor runs, the fastest first.
std::vector<const Kernels *> available_kernels();

std::vector<TypeInfo> packable_types();

}  // namespace edgellm
