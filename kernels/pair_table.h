// Which experts follow which: foresees a layer's experts from those of the two layers before it, without hidden states.
//
// The same table as edgellm/moe/pair_table.py, which explains it, and bit for bit the same predictions: float64, only
// + - * /, square roots and comparisons, in the same order, compiled without contraction to fused multiply-add.
// Not for several threads at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace edgellm {

class PairTable {
  public:
    // Throws std::invalid_argument.
    PairTable(int layers, int experts);

    // `layer` used `rows`, (tokens, used): distinct experts for each token of a step.
    void observe(int layer, const int32_t * rows, size_t tokens, size_t used);
    // The `count` experts, at most as many as there are, that `layer` will most probably use for a token of the step,
    // the most probable first.
    void predict(int layer, size_t token, size_t count, int32_t * chosen);

    int layers() const { return layers_; }
    int experts() const { return experts_; }

    // What was learned, `state_bytes` of it: pairs near, pairs far, frequencies (little-endian).
    size_t state_bytes() const { return 2 * near_.size() + 2 * hot_.size(); }
    void save(uint8_t * state) const;
    void restore(const uint8_t * state);

  private:
    struct Rows {  // of a layer, for each token of the step
        std::vector<int32_t> experts;
        size_t tokens = 0, used = 0;
    };
    void follow(std::vector<uint8_t> & counts, int layer, const Rows & before, size_t token, const int32_t * experts, size_t used);
    void weigh(const std::vector<uint8_t> & counts, int layer, const Rows & before, size_t token);

    int layers_, experts_;
    std::vector<uint8_t> near_, far_;         // (layers, experts of a layer before, experts)
    std::vector<uint16_t> hot_;               // (layers, experts)
    std::vector<std::vector<int32_t>> last_;  // (layers): used for the last token
    Rows before_[2];                          // of the last two layers: near, far
    int at_ = -1;                             // the layer observed last
    std::vector<double> odds_, weights_, shares_;
    std::vector<int32_t> order_;
};

}  // namespace edgellm
