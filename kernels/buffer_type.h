// The packed weights as a buffer type of ggml's CPU backend. See buffer_type.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "packed.h"

namespace edgellm {

// Puts the buffer type, with these kernels, before ggml's own. Once a process, after set_host (host.h).
void install_packing(const Kernels & kernels);

// Whether models that this thread loads from now on are packed.
void set_packing(bool on);

// Bytes of packed weights in memory.
size_t packed_bytes();

}  // namespace edgellm
