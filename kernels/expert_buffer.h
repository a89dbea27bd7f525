// The stacked expert tensors as a buffer type of ggml's CPU backend. See expert_buffer.cpp.
#pragma once

#include "expert_store.h"
#include "packed.h"

namespace edgellm {

// Puts the buffer type before ggml's own. Once a process, after set_host (host.h). `kernels` multiply by packed experts;
// nullptr where there are none.
void install_experts(const Kernels * kernels);

// The expert tensors of models that this thread loads from now on lie in `store`; nullptr: in llama.cpp's own buffers.
// The store must outlive the model.
void set_expert_store(ExpertStore * store);

}  // namespace edgellm
