// Narrow weights: quantised matrices that are stored with fewer bits than their type has, and expanded into it on their
// way into memory. After EdgeMoE's expert-wise bit widths (arXiv 2308.14352).
//
// A block of a GGUF matrix is a part that is kept (scales, minima) and an array of codes of n bits. A narrow matrix has
// the parts that are kept as they are, and for each code an index of b < n bits into a table of 2^b codes:
//
//   table (64 B)           2^b codes, one byte each, then zeros
//   indices (32 b B each)  of 256 codes, in the order of the columns, row after row; the last group ends with zeros
//   parts that are kept    of all blocks
//
// The 256 indices of a group lie in one or two planes, the lower bits first:
//
//   nibbles (128 B, b >= 4)       byte i: those of codes i and 128 + i
//   pairs (64 B, b = 2, 3, 6)     byte i: those of codes i, 64 + i, 128 + i, 192 + i
//   single bits (32 B, b = 3, 5)  byte i: those of codes i, 32 + i, .., 224 + i
//
// The table is the matrix's own (narrow_table.h). Types whose weight is scale * value + offset: Q4_0, Q4_1, Q5_0, Q5_1,
// Q8_0, Q4_K, Q5_K, Q6_K, IQ4_NL, MXFP4; the last two have tables of values themselves, for which codes stand.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace edgellm {

constexpr int kGroup = 256;             // codes whose indices lie together
constexpr int kTableBytes = 64;         // at the head of a narrow matrix
constexpr int kLeastBits = 2, kMostBits = 6;

// A type of ggml's (ggml-common.h), as narrowing sees it.
struct CodedType {
    int32_t type;
    int bits;     // of a code
    int columns;  // in a block
    int bytes;    // of a block
    int kept_at;  // where the part that is kept begins, which is the block's beginning or its end
    int kept_bytes;
};

// nullptr for a type that cannot be narrowed.
const CodedType * coded_type(int32_t type);

// Bits of the type's codes; 0 for a type that cannot be narrowed.
int code_bits(int32_t type);

// Whether matrices of the type can be stored with `bits` bits a code. Of all that follows, it and that `columns` is a
// multiple of the type's block are preconditions.
bool can_narrow(int32_t type, int bits);

// Bytes of a narrow matrix.
size_t narrow_size(int32_t type, int64_t columns, int64_t rows, int bits);

// Narrows a matrix as it stands in a GGUF file.
void narrow(int32_t type, int64_t columns, int64_t rows, int bits, const void * source, void * stored);

// The other way: `source` is what a GGUF file would hold. Any bytes may be widened; a table of another type's codes
// gives other weights, but nothing outside `source` is written.
void widen(int32_t type, int64_t columns, int64_t rows, int bits, const void * stored, void * source);

// What narrowing to each of `bits` does to the weights: squared error over squared norm. 0 for a matrix of zeros; blocks
// whose scale is not a finite number do not count.
std::vector<double> narrow_errors(int32_t type, int64_t columns, int64_t rows, const std::vector<int> & bits,
                                  const void * source);

// `widen` for each instruction set.
struct Wideners {
    const char * name;
    // Widens `codes` codes (a multiple of the type's block). `table`: 64 bytes; `indices`: whole groups; `kept`: of as
    // many blocks as there are.
    void (*widen)(const CodedType & type, int bits, int64_t codes, const uint8_t * table, const uint8_t * indices,
                  const uint8_t * kept, uint8_t * source);
};

extern const Wideners kWidenPortable;
extern const Wideners kWidenAvx2;

// Those that this processor runs, the fastest first.
const std::vector<const Wideners *> & available_wideners();

// `widen` with these.
void widen_with(const Wideners & wideners, int32_t type, int64_t columns, int64_t rows, int bits, const void * stored,
                void * source);

}  // namespace edgellm
