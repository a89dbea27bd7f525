// Attention of one row by the path of several: so an answer's logits do not depend on how many rows its steps have.
//
// ggml's flash attention has a path of its own for a step of one row over 512 cells or more: it divides the cells among
// the threads, and adds up in another order. The difference is in the last bits, but activations are rounded to signed
// bytes before they are multiplied, and where such a rounding tips over it is no longer small: logits were seen to
// differ by 0.3 to 1. A drafted answer, whose steps have several rows, would then differ from one that is not.
#pragma once

#include "ggml_abi.h"

namespace edgellm {

// For an operation that ggml computes itself. Not used where threads outnumber half of the heads: there the path for one
// row is much the faster one.
ggml::TensorTraits * one_row_as_several();

}  // namespace edgellm
