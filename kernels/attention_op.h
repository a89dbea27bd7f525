// Attention inside ggml's graph: steps of few rows are computed by edgellm (attention.h), and rows do not depend on the
// width of their step.
//
// ggml's flash attention has a path of its own for a step of one row over 512 cells or more: it divides the cells among
// the threads, and adds up in another order. The difference is in the last bits, but activations are rounded to signed
// bytes before they are multiplied, and where such a rounding tips over it is no longer small: logits were seen to
// differ by 0.3 to 1. A drafted answer, whose steps have several rows, would then differ from one that is not.
#pragma once

#include "attention.h"
#include "ggml_abi.h"

namespace edgellm {

// With which kernels attention is computed; null: by ggml. Once a process, before the first model is loaded.
void set_attention(const AttentionKernels * kernels);

// For an operation that is nobody else's. Attention that is of a form not known here is left to ggml, but a single row
// then takes the path of several, unless threads outnumber half of the heads: there that one is much slower.
ggml::TensorTraits * attention_traits();

}  // namespace edgellm
