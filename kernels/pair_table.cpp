#include "pair_table.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace edgellm {
namespace {

constexpr uint8_t kMostPair = 255;
constexpr uint16_t kMostHot = 65535;
constexpr double kPrior = 8.0, kNever = 0.5, kAgain = 1.6;

template <class Count> void count(Count * counts, size_t n, const int32_t * experts, size_t used, Count most) {
    if (std::any_of(experts, experts + used, [&](int32_t e) { return counts[e] >= most; }))
        for (size_t e = 0; e < n; ++e) counts[e] = static_cast<Count>(counts[e] / 2);
    for (size_t i = 0; i < used; ++i) ++counts[experts[i]];
}

}  // namespace

PairTable::PairTable(int layers, int experts) : layers_(layers), experts_(experts) {
    if (layers < 1 || experts < 1) throw std::invalid_argument("there must be a layer and an expert");
    const auto l = static_cast<size_t>(layers), n = static_cast<size_t>(experts);
    near_.assign(l * n * n, 0);
    far_.assign(l * n * n, 0);
    hot_.assign(l * n, 0);
    last_.resize(l);
    odds_.resize(n);
    weights_.resize(n);
    shares_.resize(n);
    order_.resize(n);
}

void PairTable::observe(int layer, const int32_t * rows, size_t tokens, size_t used) {
    if (layer == 0 || layer != at_ + 1 || tokens != before_[0].tokens) before_[0].tokens = before_[1].tokens = 0;
    const auto n = static_cast<size_t>(experts_);
    for (size_t token = 0; token < tokens; ++token) {
        const int32_t * experts = rows + token * used;
        if (before_[0].tokens != 0) follow(near_, layer, before_[0], token, experts, used);
        if (before_[1].tokens != 0) follow(far_, layer, before_[1], token, experts, used);
        count(&hot_[static_cast<size_t>(layer) * n], n, experts, used, kMostHot);
    }
    std::swap(before_[0], before_[1]);
    before_[0].experts.assign(rows, rows + tokens * used);
    before_[0].tokens = tokens;
    before_[0].used = used;
    last_[static_cast<size_t>(layer)].assign(rows + (tokens - std::min<size_t>(tokens, 1)) * used, rows + tokens * used);
    at_ = layer;
}

void PairTable::follow(std::vector<uint8_t> & counts, int layer, const Rows & before, size_t token, const int32_t * experts, size_t used) {
    const auto n = static_cast<size_t>(experts_);
    const int32_t * former = &before.experts[token * before.used];
    for (size_t i = 0; i < before.used; ++i)
        count(&counts[(static_cast<size_t>(layer) * n + static_cast<size_t>(former[i])) * n], n, experts, used, kMostPair);
}

void PairTable::weigh(const std::vector<uint8_t> & counts, int layer, const Rows & before, size_t token) {
    const auto n = static_cast<size_t>(experts_);
    double *odds = odds_.data(), *weights = weights_.data();
    for (size_t i = 0; i < before.used; ++i) {
        const size_t former = static_cast<size_t>(before.experts[token * before.used + i]);
        const uint8_t * row = &counts[(static_cast<size_t>(layer) * n + former) * n];
        for (size_t e = 0; e < n; ++e) odds[e] *= 1.0 + static_cast<double>(row[e]) * weights[e];
    }
}

void PairTable::predict(int layer, size_t token, size_t count, int32_t * chosen) {
    const auto n = static_cast<size_t>(experts_);
    const uint16_t * hot = &hot_[static_cast<size_t>(layer) * n];
    const double total = static_cast<double>(std::accumulate(hot, hot + n, uint64_t{0})) + kNever * experts_;
    for (size_t e = 0; e < n; ++e) {
        shares_[e] = (static_cast<double>(hot[e]) + kNever) / total;
        weights_[e] = 1.0 / (kPrior * shares_[e]);
        odds_[e] = 1.0;
    }
    const bool follows = layer > 0 && layer == at_ + 1;
    if (follows && token < before_[0].tokens) weigh(near_, layer, before_[0], token);
    if (follows && token < before_[1].tokens) weigh(far_, layer, before_[1], token);
    std::vector<double> & scores = odds_;
    for (size_t e = 0; e < n; ++e) scores[e] = shares_[e] * std::sqrt(odds_[e]);
    if (!follows || before_[0].tokens == 1)
        for (const int32_t e : last_[static_cast<size_t>(layer)]) scores[static_cast<size_t>(e)] *= kAgain;
    std::iota(order_.begin(), order_.end(), 0);
    std::partial_sort(order_.begin(), order_.begin() + static_cast<std::ptrdiff_t>(count), order_.end(), [&](int32_t a, int32_t b) {
        const double x = scores[static_cast<size_t>(a)], y = scores[static_cast<size_t>(b)];
        return x > y || (x == y && a < b);
    });
    std::copy_n(order_.begin(), count, chosen);
}

void PairTable::save(uint8_t * state) const {
    state = std::copy(near_.begin(), near_.end(), state);
    state = std::copy(far_.begin(), far_.end(), state);
    for (const uint16_t hot : hot_) {
        *state++ = static_cast<uint8_t>(hot & 255);
        *state++ = static_cast<uint8_t>(hot >> 8);
    }
}

void PairTable::restore(const uint8_t * state) {
    std::copy_n(state, near_.size(), near_.begin());
    std::copy_n(state + near_.size(), far_.size(), far_.begin());
    state += near_.size() + far_.size();
    for (uint16_t & hot : hot_) {
        hot = static_cast<uint16_t>(state[0] | state[1] << 8);
        state += 2;
    }
}

}  // namespace edgellm
