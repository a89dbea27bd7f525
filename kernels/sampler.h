// Drawing a token from logits, without sorting the vocabulary.
//
// The order of what is applied is llama.cpp's: logit bias, repetition penalty, presence and frequency penalties, top-k,
// typical, top-p, min-p, temperature, draw. Truncations see probabilities at temperature 1. The draw inverts the
// cumulative distribution in the order of the token ids; each takes one number of 53 bits from the answer's own
// generator (mt19937_64, seeded).
#pragma once

#include <cstdint>
#include <deque>
#include <random>
#include <unordered_map>
#include <utility>
#include <vector>

namespace edgellm {

struct SamplerParams {
    float temperature = 1.0f;  // 0: greedy; of equal logits the first
    int32_t top_k = 0;         // 0: off
    float top_p = 1.0f;        // the fewest likeliest tokens that have this probability together
    float min_p = 0.0f;        // tokens at least so probable, in parts of the likeliest's probability
    float typical_p = 1.0f;    // Meister et al. 2023, "Locally Typical Sampling"
    float repetition_penalty = 1.0f;
    int32_t repetition_window = 64;
    float presence_penalty = 0.0f;
    float frequency_penalty = 0.0f;
    uint64_t seed = 0;
};

class Sampler {
  public:
    Sampler(int32_t n_vocab, const SamplerParams & params, std::vector<std::pair<int32_t, float>> bias);

    // A token drawn from `logits` (n_vocab of them), none of those in `refused`; -1 if none is left, -2 if the largest
    // logit is not a number. Does not remember it.
    int32_t draw(const float * logits, const std::vector<int32_t> & refused);

    // `token` belongs to the answer: penalties count it from now on.
    void accept(int32_t token);

    // `token` belongs to the prompt: only the repetition penalty counts it.
    void remember(int32_t token);

  private:
    struct Candidate {
        int32_t token;
        float logit;
        float p;
    };

    const float * adjusted(const float * logits, const std::vector<int32_t> & refused);
    int32_t draw_from_all(const float * logits, float largest);
    int32_t draw_from_candidates(float largest);
    void collect(const float * logits, float least);
    void keep_top_k(const float * logits, float largest, size_t k);
    void keep_typical();
    void keep_top_p(const float * logits, float largest);
    void set_probabilities(float largest);
    double uniform() { return static_cast<double>(random_() >> 11) * 0x1p-53; }

    int32_t n_vocab_;
    SamplerParams params_;
    std::vector<std::pair<int32_t, float>> bias_;
    std::mt19937_64 random_;
    std::deque<int32_t> window_;                     // the last repetition_window tokens
    std::unordered_map<int32_t, int32_t> recent_;    // how often each stands in the window
    std::unordered_map<int32_t, int32_t> answered_;  // and in the answer
    std::vector<Candidate> candidates_;
};

}  // namespace edgellm
