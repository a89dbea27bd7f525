// The packed weights as a buffer type of ggml's CPU backend. See buffer_type.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "packed.h"

namespace edgellm {

// What is called in, and expected of, the loaded llama.cpp: addresses of functions, numbers of operations.
struct Host {
    void * extra_buffer_types;  // ggml_backend_cpu_get_extra_buffer_types()
    void * buffer_init;         // ggml_backend_buffer_init
    void * barrier;             // ggml_barrier
    void * chunk_set;           // ggml_threadpool_chunk_set
    void * chunk_add;           // ggml_threadpool_chunk_add
    void * device;              // the CPU's ggml_backend_dev_t
    int32_t op_mul_mat, op_get_rows;
    int32_t type_f32, type_i32;
};

// Puts the buffer type, with these kernels, before ggml's own. Once a process, before the first model is loaded.
void install(const Host & host, const Kernels & kernels);

// Whether models that this thread loads from now on are packed.
void set_packing(bool on);

// Bytes of packed weights in memory.
size_t packed_bytes();

}  // namespace edgellm
