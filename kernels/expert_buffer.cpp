// Expert tensors that have no memory of their own.
//
// llama.cpp gives a stacked expert tensor to this buffer type when the store knows its name. The buffer is address space
// that nobody may touch; the only operation on such a tensor is MUL_MAT_ID, which is computed here: its first thread
// tells the store which experts are needed, and all threads multiply by those matrices as they arrive. What is not
// packed is multiplied as llama.cpp does it, by its own dot product of one row with one row of activations.
#include "expert_buffer.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include <sys/mman.h>

#include "expert_rows.h"
#include "ggml_abi.h"
#include "host.h"
#include "read_ahead.h"

namespace edgellm {
namespace {

using namespace ggml;

constexpr size_t kAlignment = 64;
constexpr int64_t kBlockRows = 16;     // of weights and activations that are multiplied in one go
constexpr int64_t kChunksPerThread = 8;  // in a wave
constexpr size_t kPanelBytes = size_t{256} << 10;

const Kernels * kernels = nullptr;
BufferType buffer_type;
thread_local ExpertStore * loading = nullptr;

bool is_paged(const Tensor * t) { return t != nullptr && t->buffer != nullptr && t->buffer->buft == &buffer_type; }

struct Space;

struct Placement {  // of a tensor
    Space * space;
    const ExpertSlice * slice;
};

struct Space {  // a buffer's context
    ExpertStore * store;
    void * base;
    size_t size;
    Plan plan;
    std::vector<std::unique_ptr<Placement>> placements;
};

uint8_t * aligned(void * p) {
    return reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(p) + kAlignment - 1) & ~(kAlignment - 1));
}

float * output_row(const Tensor * op, const Row & row) {
    return reinterpret_cast<float *>(static_cast<char *>(op->data) + static_cast<size_t>(row.k) * op->nb[1] +
                                     static_cast<size_t>(row.token) * op->nb[2]);
}

// Nothing may be thrown through llama.cpp's threads: what is thrown here fails the step.
template <class F> void guarded(ExpertStore & store, const F & run) {
    try {
        run();
    } catch (const std::exception & error) {
        store.fail(error.what());
    }
}

int64_t pairs_of(const Tensor * op) { return op->src[2]->ne[0] * op->src[2]->ne[1]; }

class Traits final : public TensorTraits {
  public:
    bool work_size(int, const Tensor * op, size_t & size) override {
        size = 0;
        const ExpertSlice * slice = slice_of(op);
        if (slice == nullptr) return true;
        const Tensor * input = op->src[1];
        if (slice->packed)
            size = static_cast<size_t>(pairs_of(op)) * activation_bytes(slice->type, slice->columns) + kAlignment;
        else
            size = static_cast<size_t>(input->ne[1] * input->ne[2]) * row_size(type_traits(slice->type).vec_dot_type, slice->columns) +
                   kAlignment;
        return true;
    }

    bool compute_forward(ComputeParams * params, Tensor * op) override {
        const ExpertSlice * slice = slice_of(op);
        ExpertStore & store = *placement(op)->space->store;
        if (slice == nullptr) {
            if (params->ith == 0) {
                store.fail(std::string("an expert tensor is used in a way that cannot be paged: ") + op->src[0]->name);
                std::memset(op->data, 0, op->nb[3] * static_cast<size_t>(op->ne[3]));
            }
            return true;
        }
        multiply(*params, op, *slice, *placement(op)->space);
        return true;
    }

  private:
    static const Placement * placement(const Tensor * op) { return static_cast<const Placement *>(op->src[0]->extra); }

    static const ExpertSlice * slice_of(const Tensor * op) {
        return op->op == host().op_mul_mat_id ? placement(op)->slice : nullptr;
    }

    static void multiply(const ComputeParams & params, const Tensor * op, const ExpertSlice & slice, Space & space) {
        const bool first = params.ith == 0;
        ExpertStore & store = *space.store;
        Plan & plan = space.plan;
        if (first) {
            guarded(store, [&] {
                if (gather(op, plan, slice.packed, store.route(slice.layer, static_cast<size_t>(op->src[2]->ne[0]))))
                    store.begin(slice, plan.needed.data(), plan.needed.size());
                else
                    store.fail("the router chose experts that do not exist");
            });
            plan.usable = !store.failed();
            store.next_chunk.store(0, std::memory_order_relaxed);
            if (!plan.usable) std::memset(op->data, 0, op->nb[2] * static_cast<size_t>(op->ne[2]));
        }
        barrier(params);
        if (!plan.usable) return;
        uint8_t * activations = aligned(params.wdata);
        round(params, op, slice, plan, activations);
        barrier(params);
        // The others have begun to multiply.
        if (first && store.fresh_visit()) guarded(store, [&] { read_ahead(op, slice.layer, store, plan); });
        // After a failed read the waves go on without computing: the threads must meet at the same barriers.
        for (;;) {
            multiply_wave(params, op, slice, store, plan, activations);
            if (!store.more()) return;
            barrier(params);
            if (first) {
                guarded(store, [&] { store.next(); });
                store.next_chunk.store(0, std::memory_order_relaxed);
            }
            barrier(params);
        }
    }

    static void round(const ComputeParams & params, const Tensor * op, const ExpertSlice & slice, const Plan & plan, uint8_t * out) {
        const Tensor * input = op->src[1];
        const int64_t columns = slice.columns;
        if (slice.packed) {
            const size_t bytes = activation_bytes(slice.type, columns);
            const float * rows[kMaxTile];
            for (size_t t = static_cast<size_t>(params.ith); t < plan.tiles.size(); t += static_cast<size_t>(params.nth)) {
                const Tile & tile = plan.tiles[t];
                for (int i = 0; i < tile.count; ++i) rows[i] = input_row(input, plan.rows[static_cast<size_t>(tile.first + i)]);
                kernels->round(slice.type, columns, tile.count, rows, out + static_cast<size_t>(tile.first) * bytes, 0, columns / kBlock);
            }
            return;
        }
        const int32_t type = type_traits(slice.type).vec_dot_type;
        const size_t bytes = row_size(type, columns);
        const int64_t n = input->ne[1] * input->ne[2];
        for (int64_t i = params.ith; i < n; i += params.nth) {
            const Row row{static_cast<int32_t>(i % input->ne[1]), static_cast<int32_t>(i / input->ne[1])};
            if (type == host().type_f32)
                std::memcpy(out + static_cast<size_t>(i) * bytes, input_row(input, row), bytes);
            else
                type_traits(type).from_float(input_row(input, row), out + static_cast<size_t>(i) * bytes, columns);
        }
    }

    // This thread's share of a wave. A chunk is some rows of one expert's matrix by all of its activations.
    static void multiply_wave(const ComputeParams & params, const Tensor * op, const ExpertSlice & slice, ExpertStore & store,
                              const Plan & plan, const uint8_t * activations) {
        const auto & tasks = store.wave();
        const int64_t unit = slice.packed ? kRows : kBlockRows;
        const int64_t units = (slice.rows + unit - 1) / unit;
        const auto count = static_cast<int64_t>(tasks.size());
        const int64_t wanted = (kChunksPerThread * params.nth + std::max<int64_t>(count, 1) - 1) / std::max<int64_t>(count, 1);
        const int64_t parts = std::min(units, std::max<int64_t>(wanted, 1));
        for (;;) {
            const int64_t chunk = store.next_chunk.fetch_add(1, std::memory_order_relaxed);
            if (chunk >= count * parts) return;
            const ExpertStore::Task & task = tasks[static_cast<size_t>(chunk / parts)];
            const int64_t part = chunk % parts;
            const int64_t begin = units * part / parts * unit;
            const int64_t end = std::min(units * (part + 1) / parts * unit, slice.rows);
            if (!store.wait(task, params.ith == 0)) continue;
            if (slice.packed)
                multiply_packed(op, slice, plan, task, activations, begin, end);
            else
                multiply_plain(op, slice, plan, task, activations, begin, end);
        }
    }

    static void multiply_packed(const Tensor * op, const ExpertSlice & slice, const Plan & plan, const ExpertStore::Task & task,
                                const uint8_t * activations, int64_t begin, int64_t end) {
        const size_t group_bytes = packed_size(slice.type, slice.columns, kRows);
        const size_t row_bytes = activation_bytes(slice.type, slice.columns);
        const int32_t first = plan.tile_starts[static_cast<size_t>(task.expert)];
        const int32_t last = plan.tile_starts[static_cast<size_t>(task.expert) + 1];
        const auto panel = std::max<int32_t>(1, static_cast<int32_t>(kPanelBytes / row_bytes) / kMaxTile);  // tiles
        for (int32_t start = first; start < last; start += panel)
            for (int64_t row = begin; row < end; row += kRows)
                for (int32_t t = start; t < std::min(last, start + panel); ++t) {
                    const Tile & tile = plan.tiles[static_cast<size_t>(t)];
                    float * out[kMaxTile];
                    for (int i = 0; i < tile.count; ++i) out[i] = output_row(op, plan.rows[static_cast<size_t>(tile.first + i)]) + row;
                    kernels->multiply(slice.type, slice.columns, tile.count, task.data + static_cast<size_t>(row / kRows) * group_bytes,
                                      activations + static_cast<size_t>(tile.first) * row_bytes, out);
                }
    }

    static void multiply_plain(const Tensor * op, const ExpertSlice & slice, const Plan & plan, const ExpertStore::Task & task,
                               const uint8_t * activations, int64_t begin, int64_t end) {
        const TypeTraits & traits = type_traits(slice.type);
        const size_t weight_bytes = row_size(slice.type, slice.columns), row_bytes = row_size(traits.vec_dot_type, slice.columns);
        const int64_t width = op->src[1]->ne[1];
        const int32_t first = plan.starts[static_cast<size_t>(task.expert)], last = plan.starts[static_cast<size_t>(task.expert) + 1];
        for (int32_t from = first; from < last; from += kBlockRows)
            for (int64_t block = begin; block < end; block += kBlockRows)
                for (int32_t i = from; i < std::min<int32_t>(last, from + kBlockRows); ++i) {
                    const Row & row = plan.rows[static_cast<size_t>(i)];
                    const uint8_t * y = activations + static_cast<size_t>(row.k % width + row.token * width) * row_bytes;
                    float * out = output_row(op, row);
                    for (int64_t r = block; r < std::min(end, block + kBlockRows); ++r)
                        traits.vec_dot(static_cast<int>(slice.columns), out + r, 0, task.data + static_cast<size_t>(r) * weight_bytes, 0, y, 0, 1);
                }
    }
};

Traits traits;

class Experts final : public ExtraBufferType {
  public:
    // llama.cpp asks while it loads, with a buffer of no size in the weight's place, and again while it runs. Then a use
    // that cannot be paged is taken, too, and makes the step fail: a refusal would end the process.
    bool supports_op(Device *, const Tensor * op) override {
        const Tensor * weight = op->src[0];
        if (!is_paged(weight)) return false;
        if (weight->buffer->size != 0) return true;
        const ExpertSlice * slice = loading != nullptr ? loading->slice(weight->name) : nullptr;
        if (slice == nullptr) return false;
        const bool fits = op->op == host().op_mul_mat_id && slice->type == weight->type && slice->columns == weight->ne[0] &&
                          slice->rows == weight->ne[1] && loading->params().experts == weight->ne[2] && weight->ne[3] == 1;
        if (!fits) loading->refuse(weight->name);
        return fits;
    }

    TensorTraits * get_tensor_traits(const Tensor * op) override {
        return is_paged(op->src[0]) && op->src[0]->extra != nullptr ? &traits : nullptr;
    }
};

Experts experts;

void free_buffer(Buffer * buffer) {
    auto * space = static_cast<Space *>(buffer->context);
    if (space == nullptr) return;
    munmap(space->base, space->size);
    delete space;
}

void * get_base(Buffer * buffer) {
    return buffer->context == nullptr ? reinterpret_cast<void *>(kAlignment) : static_cast<Space *>(buffer->context)->base;
}

int init_tensor(Buffer * buffer, Tensor * tensor) {
    auto * space = static_cast<Space *>(buffer->context);
    if (space == nullptr) return 0;
    const ExpertSlice * slice = space->store->slice(tensor->name);
    if (slice == nullptr) return 1;
    space->placements.push_back(std::make_unique<Placement>(Placement{space, slice}));
    tensor->extra = space->placements.back().get();
    space->store->claim(*slice);
    return 0;
}

void set_tensor(Buffer *, Tensor *, const void *, size_t, size_t) {}  // the store reads what is needed, when it is needed

void clear(Buffer *, uint8_t) {}

const char * get_name(BufferType *) { return "EDGELLM_EXPERTS"; }

Buffer * alloc_buffer(BufferType * type, size_t size) {
    BufferInterface iface{};
    iface.free_buffer = free_buffer;
    iface.get_base = get_base;
    iface.init_tensor = init_tensor;
    iface.set_tensor = set_tensor;
    iface.clear = clear;
    Space * space = nullptr;
    if (size != 0) {
        if (loading == nullptr) return nullptr;
        void * base = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base == MAP_FAILED) return nullptr;
        space = new Space{loading, base, size, {}, {}};
    }
    return init_buffer(type, iface, space, size);
}

size_t get_alignment(BufferType *) { return kAlignment; }

}  // namespace

void install_experts(const Kernels * chosen) {
    kernels = chosen;
    buffer_type.iface = {get_name, alloc_buffer, get_alignment, nullptr, nullptr, nullptr};
    buffer_type.device = static_cast<Device *>(host().device);
    buffer_type.context = static_cast<ExtraBufferType *>(&experts);
    add_buffer_type(&buffer_type);
}

void set_expert_store(ExpertStore * store) { loading = store; }

}  // namespace edgellm
