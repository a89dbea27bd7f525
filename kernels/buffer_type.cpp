// The packed weights as a buffer type of ggml's CPU backend.
//
// ggml's CPU backend keeps a list of "extra" buffer types: places for weights in a layout of their own, each with its
// own multiplication. llama.cpp offers every weight to them in turn when a model is loaded, and the operations on a
// weight that one of them took are computed by it, on the threads and between the barriers of the CPU backend. This one
// takes the matrices that can be packed (packed.h); everything else stays with llama.cpp.
#include "buffer_type.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include <sys/mman.h>

#include "attention_op.h"
#include "ggml_abi.h"
#include "host.h"
#include "packed.h"

namespace edgellm {
namespace {

using namespace ggml;

constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPanelBytes = size_t{256} << 10;  // of activations that stay in the second-level cache
constexpr int kChunksPerThread = 4;
constexpr char kEmbedding[] = "token_embd.weight";

const Kernels * kernels = nullptr;
BufferType buffer_type;
std::atomic<size_t> bytes_in_use{0};
thread_local bool packing = false;

bool is_packed(const Tensor * weight) { return weight != nullptr && weight->buffer != nullptr && weight->buffer->buft == &buffer_type; }

bool is_whole_matrix(const Tensor * t) { return t->ne[2] == 1 && t->ne[3] == 1 && t->view_src == nullptr; }

// The rows of a tensor, numbered through all of its planes.
float * row_of(const Tensor * t, int64_t i) {
    const int64_t i1 = i % t->ne[1], rest = i / t->ne[1];
    const int64_t i2 = rest % t->ne[2], i3 = rest / t->ne[2];
    return reinterpret_cast<float *>(static_cast<char *>(t->data) + static_cast<size_t>(i1) * t->nb[1] +
                                     static_cast<size_t>(i2) * t->nb[2] + static_cast<size_t>(i3) * t->nb[3]);
}

int64_t rows_of(const Tensor * t) { return t->ne[1] * t->ne[2] * t->ne[3]; }

uint8_t * aligned(void * p) {
    return reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(p) + kAlignment - 1) & ~(kAlignment - 1));
}

class Traits final : public TensorTraits {
  public:
    bool work_size(int, const Tensor * op, size_t & size) override {
        size = op->op == host().op_mul_mat
                   ? static_cast<size_t>(rows_of(op->src[1])) * activation_bytes(op->src[0]->type, op->src[0]->ne[0]) + kAlignment
                   : 0;
        return true;
    }

    bool compute_forward(ComputeParams * params, Tensor * op) override {
        if (op->op == host().op_mul_mat)
            multiply(*params, op);
        else
            look_up(*params, op);
        return true;
    }

  private:
    static void multiply(const ComputeParams & params, const Tensor * op) {
        const Tensor *weight = op->src[0], *input = op->src[1];
        const int64_t columns = weight->ne[0], n = rows_of(input), blocks = columns / kBlock;
        const size_t row_bytes = activation_bytes(weight->type, columns);
        uint8_t * activations = aligned(params.wdata);

        // Each thread rounds some of the columns of every row.
        const int64_t first = blocks * params.ith / params.nth, last = blocks * (params.ith + 1) / params.nth;
        for (int64_t i = 0; i < n;) {
            const int tile = next_tile(n - i);
            const float * rows[kMaxTile];
            for (int k = 0; k < tile; ++k) rows[k] = row_of(input, i + k);
            kernels->round(weight->type, columns, tile, rows, activations + static_cast<size_t>(i) * row_bytes, first, last);
            i += tile;
        }
        if (params.ith == 0) reinterpret_cast<void (*)(void *, int)>(host().chunk_set)(params.threadpool, params.nth);
        barrier(params);

        const int64_t groups = weight->ne[1] / kRows;
        const int64_t chunk = std::max<int64_t>(1, groups / (static_cast<int64_t>(params.nth) * kChunksPerThread));
        const int64_t chunks = (groups + chunk - 1) / chunk;
        for (int64_t c = params.ith; c < chunks;
             c = reinterpret_cast<int (*)(void *, int)>(host().chunk_add)(params.threadpool, 1))
            multiply_groups(op, activations, row_bytes, c * chunk, std::min(groups, (c + 1) * chunk));
    }

    // Groups [first, last) of the weight by all rows of the input, a panel of them at a time.
    static void multiply_groups(const Tensor * op, const uint8_t * activations, size_t row_bytes, int64_t first, int64_t last) {
        const Tensor * weight = op->src[0];
        const size_t group_bytes = packed_size(weight->type, weight->ne[0], kRows);
        const uint8_t * groups = static_cast<const uint8_t *>(weight->data);
        const int64_t n = rows_of(op);
        const int64_t panel = std::max<int64_t>(1, static_cast<int64_t>(kPanelBytes / row_bytes) / kMaxTile) * kMaxTile;
        for (int64_t start = 0; start < n; start += panel) {
            const int64_t end = std::min(n, start + panel);
            for (int64_t g = first; g < last; ++g)
                for (int64_t i = start; i < end;) {
                    const int tile = next_tile(end - i);
                    float * out[kMaxTile];
                    for (int k = 0; k < tile; ++k) out[k] = row_of(op, i + k) + g * kRows;
                    kernels->multiply(weight->type, weight->ne[0], tile, groups + static_cast<size_t>(g) * group_bytes,
                                      activations + static_cast<size_t>(i) * row_bytes, out);
                    i += tile;
                }
        }
    }

    static void look_up(const ComputeParams & params, const Tensor * op) {
        const Tensor *weight = op->src[0], *ids = op->src[1];
        const int64_t n = ids->ne[0];
        for (int64_t i = params.ith; i < n; i += params.nth) {
            int32_t id;
            std::memcpy(&id, static_cast<const char *>(ids->data) + static_cast<size_t>(i) * ids->nb[0], sizeof id);
            float * out = reinterpret_cast<float *>(static_cast<char *>(op->data) + static_cast<size_t>(i) * op->nb[1]);
            if (id >= 0 && id < weight->ne[1])
                unpack_row(weight->type, weight->ne[0], weight->data, id, out);
            else
                std::fill_n(out, weight->ne[0], __builtin_nanf(""));
        }
    }
};

Traits traits;

class Packed final : public ExtraBufferType {
  public:
    // llama.cpp asks while it loads, with a buffer of no size in the weight's place, and again while it runs.
    bool supports_op(Device *, const Tensor * op) override {
        const Tensor *weight = op->src[0], *input = op->src[1];
        if (!is_packed(weight) || input == nullptr || (weight->buffer->size == 0 && !packing)) return false;
        if (!is_whole_matrix(weight) || !can_pack(weight->type, weight->ne[0], weight->ne[1])) return false;
        if (op->op == host().op_mul_mat)
            return input->type == host().type_f32 && input->nb[0] == sizeof(float) && op->type == host().type_f32;
        // Other tables are looked up through views of them, too.
        return op->op == host().op_get_rows && std::strcmp(weight->name, kEmbedding) == 0 && input->type == host().type_i32 &&
               input->ne[1] == 1 && input->ne[2] == 1 && input->ne[3] == 1;
    }

    TensorTraits * get_tensor_traits(const Tensor * op) override {
        const bool ours = (op->op == host().op_mul_mat || op->op == host().op_get_rows) && is_packed(op->src[0]);
        return ours ? &traits : attention_traits();
    }
};

Packed packed;

size_t mapped_size(size_t size) { return (size + kHugePage - 1) / kHugePage * kHugePage; }

// Memory in huge pages where there are any: a step reads all of it, and address translation costs time.
void * allocate(size_t size) {
    const size_t wanted = mapped_size(size) + kHugePage;
    void * p = mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    const uintptr_t start = reinterpret_cast<uintptr_t>(p), begin = (start + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end = begin + mapped_size(size);
    if (begin > start) munmap(p, begin - start);
    if (start + wanted > end) munmap(reinterpret_cast<void *>(end), start + wanted - end);
#ifdef MADV_HUGEPAGE
    madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#endif
    return reinterpret_cast<void *>(begin);
}

void free_buffer(Buffer * buffer) {
    if (buffer->size == 0) return;
    munmap(buffer->context, mapped_size(buffer->size));
    bytes_in_use -= buffer->size;
}

void * get_base(Buffer * buffer) { return buffer->size == 0 ? reinterpret_cast<void *>(kAlignment) : buffer->context; }

int init_tensor(Buffer *, Tensor *) { return 0; }

// Packs a whole tensor, the parts of it on several threads.
void set_tensor(Buffer *, Tensor * tensor, const void * data, size_t offset, size_t size) {
    const int64_t columns = tensor->ne[0], groups = tensor->ne[1] / kRows;
    const size_t packed_group = packed_size(tensor->type, columns, kRows);
    const size_t source_group = tensor->nb[1] * kRows;
    if (offset != 0 || size != static_cast<size_t>(groups) * source_group) {
        std::fprintf(stderr, "edgellm: a part of %s cannot be packed by itself\n", tensor->name);
        std::abort();  // as ggml's own layouts do: llama.cpp hands over whole tensors, and half of one would serve nonsense
    }
    const auto work = [&](int64_t first, int64_t last) {
        edgellm::pack(tensor->type, columns, (last - first) * kRows,
                      static_cast<const uint8_t *>(data) + static_cast<size_t>(first) * source_group,
                      static_cast<uint8_t *>(tensor->data) + static_cast<size_t>(first) * packed_group);
    };
    const int64_t workers = std::min<int64_t>(groups / 8, std::thread::hardware_concurrency());
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < workers; ++i) {
        const int64_t first = groups * i / workers, last = groups * (i + 1) / workers;
        try {
            threads.emplace_back(work, first, last);
        } catch (const std::system_error &) {  // no more threads are to be had
            work(first, last);
        }
    }
    work(0, workers > 1 ? groups / workers : groups);
    for (std::thread & thread : threads) thread.join();
}

void clear(Buffer * buffer, uint8_t value) {
    if (buffer->size != 0) std::memset(buffer->context, value, buffer->size);
}

const char * get_name(BufferType *) { return "EDGELLM_PACKED"; }

Buffer * alloc_buffer(BufferType * type, size_t size) {
    BufferInterface iface{};
    iface.free_buffer = free_buffer;
    iface.get_base = get_base;
    iface.init_tensor = init_tensor;
    iface.set_tensor = set_tensor;
    iface.clear = clear;
    void * memory = nullptr;
    if (size != 0) {
        memory = allocate(size);
        if (memory == nullptr) return nullptr;
        bytes_in_use += size;
    }
    return init_buffer(type, iface, memory, size);
}

size_t get_alignment(BufferType *) { return kAlignment; }

size_t get_alloc_size(BufferType *, const Tensor * t) { return packed_size(t->type, t->ne[0], t->ne[1]); }

}  // namespace

void install_packing(const Kernels & chosen) {
    kernels = &chosen;
#if defined(__x86_64__)
    set_attention(&kAttentionAvx2);  // whoever has the other kernels has AVX2 as well
#endif
    buffer_type.iface = {get_name, alloc_buffer, get_alignment, nullptr, get_alloc_size, nullptr};
    buffer_type.device = static_cast<Device *>(host().device);
    buffer_type.context = static_cast<ExtraBufferType *>(&packed);
    add_buffer_type(&buffer_type);
}

void set_packing(bool on) { packing = on; }

size_t packed_bytes() { return bytes_in_use; }

}  // namespace edgellm
