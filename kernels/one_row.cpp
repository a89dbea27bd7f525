#include "one_row.h"

#include "host.h"

namespace edgellm {
namespace {

using namespace ggml;

class OneRow final : public TensorTraits {
  public:
    bool work_size(int, const Tensor *, size_t &) override { return false; }

    // ggml does the work. With `use_ref` set it leaves out its paths for one row and for very many; the flag belongs to
    // the thread and outlives the operation, so the next one takes it back.
    bool compute_forward(ComputeParams * params, Tensor * op) override {
        params->use_ref = op->op == host().op_attention && op->src[0]->ne[1] == 1 && op->src[0]->ne[2] >= 2 * params->nth;
        return false;
    }
};

OneRow one_row;

}  // namespace

TensorTraits * one_row_as_several() { return &one_row; }

}  // namespace edgellm
