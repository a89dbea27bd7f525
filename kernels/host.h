// What is called in, and expected of, the loaded llama.cpp: addresses of functions, numbers of operations and types.
// edgellm/backend/host.py finds them, and checks that the library is laid out as ggml_abi.h says.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ggml_abi.h"

namespace edgellm {

struct Host {
    void * extra_buffer_types;  // ggml_backend_cpu_get_extra_buffer_types()
    void * buffer_init;         // ggml_backend_buffer_init
    void * barrier;             // ggml_barrier
    void * chunk_set;           // ggml_threadpool_chunk_set
    void * chunk_add;           // ggml_threadpool_chunk_add
    void * type_traits;         // ggml_get_type_traits_cpu
    void * row_size;            // ggml_row_size
    void * device;              // the CPU's ggml_backend_dev_t
    int32_t op_mul_mat, op_mul_mat_id, op_get_rows, op_attention;
    int32_t type_f32, type_f16, type_i32;
};

// Set once a process, before the first model is loaded.
void set_host(const Host & found);
const Host & host();

// Puts a buffer type before those that ggml's CPU backend offers every weight to.
void add_buffer_type(ggml::BufferType * type);

inline void barrier(const ggml::ComputeParams & params) {
    reinterpret_cast<void (*)(void *)>(host().barrier)(params.threadpool);
}

inline const ggml::TypeTraits & type_traits(int32_t type) {
    return *reinterpret_cast<const ggml::TypeTraits * (*)(int32_t)>(host().type_traits)(type);
}

inline size_t row_size(int32_t type, int64_t columns) {
    return reinterpret_cast<size_t (*)(int32_t, int64_t)>(host().row_size)(type, columns);
}

// A buffer of `size` bytes at `memory`; `context` comes back to the functions of `iface`.
inline ggml::Buffer * init_buffer(ggml::BufferType * type, const ggml::BufferInterface & iface, void * context, size_t size) {
    using Init = ggml::Buffer * (*)(ggml::BufferType *, ggml::BufferInterface, void *, size_t);
    return reinterpret_cast<Init>(host().buffer_init)(type, iface, context, size);
}

}  // namespace edgellm
