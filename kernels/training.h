// What training computes between products of matrices, each piece in one pass over memory, forward and backward.
// Numbers are floats, or bfloat16 as the 16 bits that hold it, which is computed with as floats.
#pragma once

#include <cstdint>
#include <vector>

namespace edgellm {

// How rotary embeddings turn a head, and how heads are laid out behind them. Heads stand as (tokens, heads, width), or
// grouped as (heads / share, tokens, share, width): those that share keys together, one matrix for each group.
struct Turning {
    int64_t tokens, heads, width;
    int64_t share;  // heads of a group
    int64_t pairs;  // the first 2 * pairs elements of a head are turned, by cosine and sine, (tokens, pairs)
    bool interleaved;  // pairs are neighbours; else they are `pairs` apart
};

// Scores of attention, (groups, rows, keys): row r is of query r / share, whose last visible key is `past` + r / share.
// It sees `window` keys up to that one; 0: all.
struct Scores {
    int64_t groups, rows, keys;
    int64_t share, past, window;
    float scale;
};

// For one type of numbers. Rows of everything stand end to end.
template <class T> struct TrainingKernels {
    // y = x / rms(x) * weight; scale: 1 / rms(x), (rows,).
    void (*norm)(int64_t rows, int64_t columns, const float * x, const float * weight, float epsilon, T * y, float * scale);
    // dx, from the gradient of y.
    void (*norm_back)(int64_t rows, int64_t columns, const T * dy, const float * x, const float * weight,
                      const float * scale, float * dx);
    // y = silu(gate) * up, or tanh-GELU.
    void (*gate)(int64_t n, const T * gate, const T * up, bool gelu, T * y);
    void (*gate_back)(int64_t n, const T * dy, const T * gate, const T * up, bool gelu, T * dgate, T * dup);
    // From (tokens, heads, width) to grouped heads, tokens [first, last).
    void (*turn)(const Turning & how, int64_t first, int64_t last, const T * x, const float * cosine, const float * sine,
                 T * y);
    // The other way, and turned back: what gradients do.
    void (*turn_back)(const Turning & how, int64_t first, int64_t last, const T * dy, const float * cosine,
                      const float * sine, T * dx);
    // Softmax of scale * scores in place, rows [first, last) of all groups; 0 where a key is not seen.
    void (*softmax)(const Scores & of, int64_t first, int64_t last, T * scores);
    // Gradients of the weights to gradients of the scores, in place.
    void (*softmax_back)(const Scores & of, int64_t first, int64_t last, const T * weights, T * gradient);
    // -log softmax(logits)[target] and whether the first of the greatest logits is the target's; with `gradient`, the
    // logits become softmax - one-hot.
    void (*losses)(int64_t rows, int64_t columns, T * logits, const int64_t * targets, bool gradient, float * losses,
                   bool * correct);
};

// For an instruction set.
struct TrainingSet {
    const char * name;
    TrainingKernels<float> floats;
    TrainingKernels<uint16_t> halves;
};

extern const TrainingSet kTrainingPortable;
extern const TrainingSet kTrainingAvx2;
extern const TrainingSet kTrainingAvx512;

// Those that this processor runs, the fastest first.
const std::vector<const TrainingSet *> & available_training();

}  // namespace edgellm
