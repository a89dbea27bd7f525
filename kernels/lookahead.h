// Which experts the coming layers will choose: their routers, applied now to the input of this layer's router.
//
// Hidden states change little from layer to layer, so the next layer's router mostly chooses from today's state what it
// will choose from tomorrow's ("Fate", arXiv 2502.12224; measured in docs/benchmarks.md). Distance 0, a layer's own router on its
// own input, must choose what the layer chose: it is the check that the input is the router's at all, which it is not
// in every architecture.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace edgellm {

struct Router {
    std::vector<float> weights;         // (experts, width)
    std::vector<float> bias;            // of the logits; (experts,) or empty
    std::vector<float> selection_bias;  // added to the probabilities before the choice; (experts,) or empty
    bool sigmoid = false;               // probabilities by sigmoid, not by softmax
};

class Lookahead {
  public:
    // `routers[layer]`; one without weights predicts nothing. `used`: experts for each token.
    Lookahead(int experts, int used, size_t width, std::vector<Router> routers);

    // The `used` experts that the layer's router would choose for a token with this router input, (width,), the best
    // first. False if the layer has no router here.
    bool choose(int layer, const float * input, int32_t * chosen);

    // Whether look-ahead from this layer can be relied on, as its first visits have shown.
    bool trusted(int layer) const;
    // Whether it never will be: its visits have shown that it cannot, or it has no router here to be checked with.
    bool hopeless(int layer) const;
    // The layer chose these (any order) for a token with this input.
    void check(int layer, const float * input, const int32_t * chosen);

    int used() const { return used_; }
    size_t width() const { return width_; }

  private:
    int experts_, used_;
    size_t width_;
    std::vector<Router> routers_;
    std::vector<int> checks_, agreed_;  // (layers,): tokens, slots
    std::vector<float> scores_;
    std::vector<int32_t> order_, own_;
};

}  // namespace edgellm
