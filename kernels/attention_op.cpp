#include "attention_op.h"

#include <cstring>

#include "host.h"

namespace edgellm {
namespace {

using namespace ggml;

constexpr int64_t kFewRows = 64;  // ggml has a path for as many or more, which reads each key once for all of them
constexpr size_t kAlignment = 64;

const AttentionKernels * kernels = nullptr;

float parameter(const Tensor * op, int index) {
    float value;
    std::memcpy(&value, &op->op_params[index], sizeof value);
    return value;
}

bool halves(const Tensor * t, int64_t width) {
    return t->type == host().type_f16 && t->nb[0] == 2 && t->ne[0] == width && t->ne[3] == 1 && width % 8 == 0 && width <= kMostWidth;
}

// Parameters are the scale, a bias by distance, and a bound on scores; the last source are weights of no cell.
bool is_known(const Tensor * op) {
    const Tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    return kernels != nullptr && mask != nullptr && op->src[4] == nullptr && parameter(op, 1) == 0.0f && parameter(op, 2) == 0.0f &&
           q->type == host().type_f32 && q->nb[0] == 4 && q->ne[1] < kFewRows && q->ne[3] == 1 && halves(k, q->ne[0]) &&
           halves(v, op->ne[0]) && k->ne[1] % kBlockCells == 0 && q->ne[2] % k->ne[2] == 0 && v->ne[2] == k->ne[2] &&
           mask->type == host().type_f16 && mask->nb[0] == 2 && mask->ne[2] == 1 && mask->ne[3] == 1 && mask->ne[0] >= k->ne[1];
}

Attention of(const Tensor * op, void * memory) {
    const Tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    const uintptr_t place = reinterpret_cast<uintptr_t>(memory);
    Attention found{};
    found.rows = q->ne[1];
    found.heads = q->ne[2];
    found.kv_heads = k->ne[2];
    found.cells = k->ne[1];
    found.key_width = k->ne[0];
    found.value_width = v->ne[0];
    found.query = static_cast<const char *>(q->data);
    found.query_row = q->nb[1];
    found.query_head = q->nb[2];
    found.keys = static_cast<const char *>(k->data);
    found.key_cell = k->nb[1];
    found.key_head = k->nb[2];
    found.values = static_cast<const char *>(v->data);
    found.value_cell = v->nb[1];
    found.value_head = v->nb[2];
    found.mask = static_cast<const char *>(mask->data);
    found.mask_row = mask->nb[1];
    found.scale = parameter(op, 0);
    found.result = static_cast<float *>(op->data);
    found.parts = reinterpret_cast<float *>((place + kAlignment - 1) / kAlignment * kAlignment);
    if (memory != nullptr) found.seen = reinterpret_cast<int32_t *>(found.parts + part_floats(found));
    return found;
}

class AttentionTraits final : public TensorTraits {
  public:
    bool work_size(int, const Tensor * op, size_t & size) override {
        if (op->op != host().op_attention || !is_known(op)) return false;
        const Attention task = of(op, nullptr);
        size = static_cast<size_t>(part_floats(task)) * sizeof(float) + static_cast<size_t>(seen_numbers(task)) * sizeof(int32_t) + kAlignment;
        return true;
    }

    bool compute_forward(ComputeParams * params, Tensor * op) override {
        params->use_ref = false;
        if (op->op != host().op_attention) return false;
        if (is_known(op)) {
            attend(*params, of(op, params->wdata));
            return true;
        }
        // With the flag set ggml leaves out its paths for one row and for very many. It belongs to the thread and
        // outlives the operation, so the next one takes it back.
        params->use_ref = op->src[0]->ne[1] == 1 && op->src[0]->ne[2] >= 2 * params->nth;
        return false;
    }

  private:
    static void attend(const ComputeParams & params, const Attention & task) {
        if (params.ith == 0) reinterpret_cast<void (*)(void *, int)>(host().chunk_set)(params.threadpool, params.nth);
        kernels->look(task, task.rows * params.ith / params.nth, task.rows * (params.ith + 1) / params.nth);
        barrier(params);
        const int64_t parts = part_count(task);
        for (int64_t i = params.ith; i < parts * task.kv_heads;
             i = reinterpret_cast<int (*)(void *, int)>(host().chunk_add)(params.threadpool, 1))
            kernels->part(task, i % task.kv_heads, i / task.kv_heads);
        barrier(params);
        const int64_t all = task.rows * task.heads;
        kernels->gather(task, all * params.ith / params.nth, all * (params.ith + 1) / params.nth);
    }
};

AttentionTraits traits;

}  // namespace

void set_attention(const AttentionKernels * chosen) { kernels = chosen; }

TensorTraits * attention_traits() { return &traits; }

}  // namespace edgellm
