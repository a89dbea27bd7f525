// The parts of ggml's binary interface that edgellm hooks into, as llama.cpp has them in the release that
// edgellm pins. Only layouts are stated here, no code: edgellm/backend/host.py checks them against the loaded library
// (sizes, offsets, operation and type names) and does without the hooks if anything differs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgellm::ggml {

constexpr int kMaxDims = 4;
constexpr int kMaxSources = 10;

struct Buffer;
struct BufferType;
struct Device;

struct Tensor {
    int32_t type;
    Buffer * buffer;
    int64_t ne[kMaxDims];  // elements along each dimension, rows first
    size_t nb[kMaxDims];   // strides in bytes
    int32_t op;
    int32_t op_params[16];
    int32_t flags;
    Tensor * src[kMaxSources];
    Tensor * view_src;
    size_t view_offs;
    void * data;
    char name[64];
    void * extra;
    char padding[8];
};
static_assert(sizeof(Tensor) == 336);

struct BufferTypeInterface {
    const char * (*get_name)(BufferType *);
    Buffer * (*alloc_buffer)(BufferType *, size_t size);
    size_t (*get_alignment)(BufferType *);
    size_t (*get_max_size)(BufferType *);
    size_t (*get_alloc_size)(BufferType *, const Tensor *);
    bool (*is_host)(BufferType *);
};

struct BufferType {
    BufferTypeInterface iface;
    Device * device;
    void * context;
};

struct BufferInterface {
    void (*free_buffer)(Buffer *);
    void * (*get_base)(Buffer *);
    int (*init_tensor)(Buffer *, Tensor *);
    void (*memset_tensor)(Buffer *, Tensor *, uint8_t value, size_t offset, size_t size);
    void (*set_tensor)(Buffer *, Tensor *, const void * data, size_t offset, size_t size);
    void (*get_tensor)(Buffer *, const Tensor *, void * data, size_t offset, size_t size);
    void * set_tensor_2d;
    void * get_tensor_2d;
    void * cpy_tensor;
    void (*clear)(Buffer *, uint8_t value);
    void * reset;
};

struct Buffer {
    BufferInterface iface;
    BufferType * buft;
    void * context;
    size_t size;
    int32_t usage;
};

struct ComputeParams {
    int32_t ith, nth;  // this thread, and how many there are
    size_t wsize;
    void * wdata;  // shared by all threads
    void * threadpool;
    bool use_ref;
};

// How rows of a type are multiplied: `from_float` rounds activations to `vec_dot_type`, `vec_dot` multiplies one row.
struct TypeTraits {
    void (*from_float)(const float * x, void * y, int64_t n);
    void (*vec_dot)(int n, float * result, size_t, const void * weights, size_t, const void * activations, size_t, int rows);
    int32_t vec_dot_type;
    int64_t nrows;
};

// C++ classes of ggml's CPU backend; the order of the virtual functions is what counts.
class TensorTraits {
  public:
    virtual ~TensorTraits() = default;
    virtual bool work_size(int threads, const Tensor * op, size_t & size) = 0;
    virtual bool compute_forward(ComputeParams * params, Tensor * op) = 0;
};

class ExtraBufferType {
  public:
    virtual ~ExtraBufferType() = default;
    virtual bool supports_op(Device * device, const Tensor * op) = 0;
    virtual TensorTraits * get_tensor_traits(const Tensor * op) = 0;
};

}  // namespace edgellm::ggml
