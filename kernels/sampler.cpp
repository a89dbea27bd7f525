// Drawing a token from logits, without sorting the vocabulary. See sampler.h.
#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

// The loops over the vocabulary are compiled for several instruction sets, and the processor picks one.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define EDGELLM_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define EDGELLM_CLONES
#endif

namespace edgellm {
namespace {

constexpr int kLanes = 16;
constexpr int32_t kStretch = 1024;  // tokens whose weights are added up before they are added to the rest
constexpr int32_t kSome = 256;      // tokens that are looked at together for one worth keeping
constexpr float kNone = -std::numeric_limits<float>::infinity();

// One buffer a thread for adjusted logits, one for weights: samplers of the same thread take turns.
thread_local std::vector<float> adjusted_buffer, weight_buffer;

// exp(x) for x <= 0; 0 below -87. The polynomial is that of Cephes' expf. Written so that compilers vectorise it.
__attribute__((always_inline)) inline float exp_of_negative(float x) {
    const float bounded = x < -87.0f ? -87.0f : x;
    const float shifted = bounded * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    const float n = shifted - 12582912.0f;
    const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float fraction = p * r * r + r + 1.0f;
    int32_t exponent;
    std::memcpy(&exponent, &shifted, 4);
    const int32_t bits = (exponent - 0x4B400000 + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : fraction * power;
}

EDGELLM_CLONES float largest_of(const float * x, int32_t n) {
    float lanes[kLanes];
    for (float & lane : lanes) lane = kNone;
    int32_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
    for (; i < n; ++i) lanes[0] = std::max(lanes[0], x[i]);
    return *std::max_element(lanes, lanes + kLanes);
}

EDGELLM_CLONES int32_t count_from(const float * x, int32_t n, float least) {
    int32_t count = 0;
    for (int32_t i = 0; i < n; ++i) count += x[i] >= least;
    return count;
}

EDGELLM_CLONES float sum_of(const float * x, int32_t n) {
    float lanes[kLanes] = {};
    int32_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int j = 0; j < kLanes; ++j) lanes[j] += x[i + j];
    float sum = 0;
    for (; i < n; ++i) sum += x[i];
    for (const float lane : lanes) sum += lane;
    return sum;
}

// The sum of those that are at least `least`.
EDGELLM_CLONES float sum_from(const float * x, int32_t n, float least) {
    float lanes[kLanes] = {};
    int32_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int j = 0; j < kLanes; ++j) lanes[j] += x[i + j] >= least ? x[i + j] : 0.0f;
    float sum = 0;
    for (; i < n; ++i) sum += x[i] >= least ? x[i] : 0.0f;
    for (const float lane : lanes) sum += lane;
    return sum;
}

EDGELLM_CLONES void exponentials(const float * x, int32_t n, float largest, float scale, float * out) {
    for (int32_t i = 0; i < n; ++i) out[i] = exp_of_negative((x[i] - largest) * scale);
}

template <class Sum> double by_stretches(int32_t n, Sum && sum) {
    double total = 0;
    for (int32_t start = 0; start < n; start += kStretch) total += sum(start, std::min(n - start, kStretch));
    return total;
}

// out[i] = exp((x[i] - largest) * scale); the sum.
double weights_of(const float * x, int32_t n, float largest, float scale, float * out) {
    exponentials(x, n, largest, scale, out);
    return by_stretches(n, [&](int32_t start, int32_t count) { return sum_of(out + start, count); });
}

float * scratch(std::vector<float> & buffer, int32_t n) {
    if (buffer.size() < static_cast<size_t>(n)) buffer.resize(static_cast<size_t>(n));
    return buffer.data();
}

}  // namespace

Sampler::Sampler(int32_t n_vocab, const SamplerParams & params, std::vector<std::pair<int32_t, float>> bias)
    : n_vocab_(n_vocab), params_(params), bias_(std::move(bias)), random_(params.seed) {
    // Beyond these, logits would no longer be finite.
    params_.repetition_penalty = std::clamp(params_.repetition_penalty, 1e-30f, 1e30f);
}

void Sampler::remember(int32_t token) {
    if (params_.repetition_penalty == 1.0f || params_.repetition_window <= 0) return;
    window_.push_back(token);
    ++recent_[token];
    if (window_.size() > static_cast<size_t>(params_.repetition_window)) {
        const auto oldest = recent_.find(window_.front());
        if (--oldest->second == 0) recent_.erase(oldest);
        window_.pop_front();
    }
}

void Sampler::accept(int32_t token) {
    remember(token);
    if (params_.presence_penalty != 0.0f || params_.frequency_penalty != 0.0f) ++answered_[token];
}

// The logits after bias, penalties and refusals; `logits` itself if none apply.
const float * Sampler::adjusted(const float * logits, const std::vector<int32_t> & refused) {
    if (bias_.empty() && recent_.empty() && answered_.empty() && refused.empty()) return logits;
    float * x = scratch(adjusted_buffer, n_vocab_);
    std::memcpy(x, logits, sizeof(float) * static_cast<size_t>(n_vocab_));
    const auto is_token = [this](int32_t token) { return token >= 0 && token < n_vocab_; };
    for (const auto & [token, value] : bias_)
        if (is_token(token)) x[token] += value;
    for (const auto & [token, count] : recent_)
        if (is_token(token)) x[token] = x[token] <= 0 ? x[token] * params_.repetition_penalty : x[token] / params_.repetition_penalty;
    for (const auto & [token, count] : answered_)
        if (is_token(token)) x[token] -= static_cast<float>(count) * params_.frequency_penalty + params_.presence_penalty;
    for (const int32_t token : refused)
        if (is_token(token)) x[token] = kNone;
    return x;
}

int32_t Sampler::draw(const float * logits, const std::vector<int32_t> & refused) {
    if (logits[0] != logits[0]) return -2;
    const float * x = adjusted(logits, refused);
    const float largest = largest_of(x, n_vocab_);
    if (largest == kNone) return -1;
    if (!std::isfinite(largest)) return -2;
    if (params_.temperature <= 0) return static_cast<int32_t>(std::find(x, x + n_vocab_, largest) - x);
    const auto k = static_cast<size_t>(params_.top_k);
    const bool cut = params_.top_k > 0 && params_.top_k < n_vocab_;
    if (!cut && params_.typical_p >= 1 && params_.top_p >= 1 && params_.min_p <= 0) return draw_from_all(x, largest);
    candidates_.clear();
    if (cut)
        keep_top_k(x, largest, k);
    else if (params_.typical_p < 1)
        collect(x, std::numeric_limits<float>::lowest());
    if (params_.typical_p < 1) {
        set_probabilities(largest);
        keep_typical();
    }
    if (params_.top_p < 1)
        keep_top_p(x, largest);
    else if (candidates_.empty())
        collect(x, largest + std::log(params_.min_p));
    if (params_.min_p > 0) {
        float best = kNone;
        for (const Candidate & c : candidates_) best = std::max(best, c.logit);
        const float least = best + std::log(params_.min_p);
        candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(),
                                         [&](const Candidate & c) { return c.logit < least && c.logit < best; }),
                          candidates_.end());
    }
    return draw_from_candidates(largest);
}

int32_t Sampler::draw_from_all(const float * x, float largest) {
    float * weights = scratch(weight_buffer, n_vocab_);
    double rest = uniform() * weights_of(x, n_vocab_, largest, 1.0f / params_.temperature, weights);
    int32_t last = 0;  // with any weight
    for (int32_t start = 0; start < n_vocab_; start += kStretch) {
        const int32_t end = std::min(n_vocab_, start + kStretch);
        const double sum = sum_of(weights + start, end - start);
        if (rest >= sum && end < n_vocab_) {
            rest -= sum;
            continue;
        }
        for (int32_t i = start; i < end; ++i) {
            if (weights[i] == 0.0f) continue;
            last = i;
            rest -= weights[i];
            if (rest < 0) return i;
        }
        rest = 0;  // rounding: the stretch summed to a little more than its tokens do; the next one with any weight it is
    }
    return weights[last] > 0.0f ? last : static_cast<int32_t>(std::find(x, x + n_vocab_, largest) - x);
}

int32_t Sampler::draw_from_candidates(float largest) {
    std::sort(candidates_.begin(), candidates_.end(), [](const Candidate & a, const Candidate & b) { return a.token < b.token; });
    double total = 0;
    for (Candidate & c : candidates_) {
        c.p = std::exp((c.logit - largest) / params_.temperature);
        total += c.p;
    }
    double rest = uniform() * total;
    for (const Candidate & c : candidates_) {
        rest -= c.p;
        if (rest < 0) return c.token;
    }
    return std::max_element(candidates_.begin(), candidates_.end(), [](const Candidate & a, const Candidate & b) {
               return a.p < b.p;
           })->token;
}

// Tokens whose logit is at least `least`, in the order of their ids.
void Sampler::collect(const float * x, float least) {
    for (int32_t start = 0; start < n_vocab_; start += kSome) {
        const int32_t end = std::min(n_vocab_, start + kSome);
        if (count_from(x + start, end - start, least) == 0) continue;
        for (int32_t i = start; i < end; ++i)
            if (x[i] >= least) candidates_.push_back({i, x[i], 0});
    }
}

// The k largest logits; of equal ones the first.
void Sampler::keep_top_k(const float * x, float largest, size_t k) {
    // Counting is quick: halve the distance to the largest logit until hardly more than k tokens are within it.
    float within = 16.0f;
    while (static_cast<size_t>(count_from(x, n_vocab_, largest - within)) < k && within < 1e30f) within *= 4;
    for (int i = 0; i < 24; ++i) {
        const auto count = static_cast<size_t>(count_from(x, n_vocab_, largest - within / 2));
        if (count < k) break;
        within /= 2;
        if (count < 8 * k) break;
    }
    collect(x, within < 1e30f ? largest - within : std::numeric_limits<float>::lowest());
    if (candidates_.size() <= k) return;
    std::nth_element(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(k), candidates_.end(),
                     [](const Candidate & a, const Candidate & b) {
                         return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
                     });
    candidates_.resize(k);
}

void Sampler::set_probabilities(float largest) {
    double total = 0;
    for (Candidate & c : candidates_) total += c.p = std::exp(c.logit - largest);
    for (Candidate & c : candidates_) c.p = static_cast<float>(c.p / total);
}

// The tokens whose surprise is nearest to the distribution's entropy, up to typical_p of the probability.
void Sampler::keep_typical() {
    double entropy = 0;
    for (const Candidate & c : candidates_)
        if (c.p > 0) entropy -= static_cast<double>(c.p) * std::log(static_cast<double>(c.p));
    const auto distance = [&](const Candidate & c) {
        return c.p > 0 ? std::fabs(-std::log(static_cast<double>(c.p)) - entropy) : std::numeric_limits<double>::infinity();
    };
    std::vector<std::pair<double, Candidate>> sorted;
    sorted.reserve(candidates_.size());
    for (const Candidate & c : candidates_) sorted.emplace_back(distance(c), c);
    std::sort(sorted.begin(), sorted.end(), [](const auto & a, const auto & b) {
        return a.first != b.first ? a.first < b.first : a.second.token < b.second.token;
    });
    double kept = 0;
    candidates_.clear();
    for (const auto & [_, c] : sorted) {
        candidates_.push_back(c);
        kept += c.p;
        if (kept > params_.typical_p) break;
    }
}

void Sampler::keep_top_p(const float * x, float largest) {
    double total = 0;
    if (candidates_.empty()) {
        float * weights = scratch(weight_buffer, n_vocab_);
        total = weights_of(x, n_vocab_, largest, 1.0f, weights);
        // All tokens less probable than (1 - top_p) / n_vocab have less than 1 - top_p together: none is among the kept.
        // Summing is quick: raise that bound for as long as what is above it has more than top_p.
        double least = (1.0 - params_.top_p) * total / n_vocab_ * 0.999, most = 1.0;
        const double enough = std::min(params_.top_p * (1.0 + 1e-5), 1.0) * total;
        for (int i = 0; i < 12 && least > 0; ++i) {
            const double between = std::sqrt(least * most);
            const auto bound = static_cast<float>(between);
            const double sum = by_stretches(
                n_vocab_, [&](int32_t start, int32_t count) { return sum_from(weights + start, count, bound); });
            (sum >= enough ? least : most) = between;
        }
        const auto bound = static_cast<float>(least);
        for (int32_t start = 0; start < n_vocab_; start += kSome) {
            const int32_t end = std::min(n_vocab_, start + kSome);
            if (count_from(weights + start, end - start, bound) == 0) continue;
            for (int32_t i = start; i < end; ++i)
                if (weights[i] >= bound) candidates_.push_back({i, x[i], 0});
        }
        for (Candidate & c : candidates_) c.p = weights[c.token];
    } else {
        for (Candidate & c : candidates_) total += c.p = std::exp(c.logit - largest);
    }
    // The fewest likeliest that have top_p of it: parts about a pivot, going on in the part that holds the border.
    const auto likelier = [](const Candidate & a, const Candidate & b) { return a.p != b.p ? a.p > b.p : a.token < b.token; };
    const double wanted = params_.top_p * total;
    size_t first = 0, last = candidates_.size();  // the border is in [first, last]; `kept` is the weight before `first`
    double kept = 0;
    while (last - first > 1) {
        const size_t middle = first + (last - first) / 2;
        const auto begin = candidates_.begin();
        std::nth_element(begin + static_cast<std::ptrdiff_t>(first), begin + static_cast<std::ptrdiff_t>(middle),
                         begin + static_cast<std::ptrdiff_t>(last), likelier);
        double half = 0;
        for (size_t i = first; i < middle; ++i) half += candidates_[i].p;
        if (kept + half >= wanted) {
            last = middle;
        } else {
            kept += half;
            first = middle;
        }
    }
    candidates_.resize(std::max<size_t>(1, last));
}

}  // namespace edgellm
