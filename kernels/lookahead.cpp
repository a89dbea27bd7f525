#include "lookahead.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "host.h"

namespace edgellm {
namespace {

constexpr int kChecks = 16;         // tokens of a layer that are checked
constexpr int kTrustedPercent = 90;  // of their slots that must agree

}  // namespace

Lookahead::Lookahead(int experts, int used, size_t width, std::vector<Router> routers)
    : experts_(experts), used_(used), width_(width), routers_(std::move(routers)), checks_(routers_.size(), 0),
      agreed_(routers_.size(), 0), scores_(static_cast<size_t>(experts)), order_(static_cast<size_t>(experts)),
      own_(static_cast<size_t>(used)) {}

bool Lookahead::choose(int layer, const float * input, int32_t * chosen) {
    if (layer < 0 || static_cast<size_t>(layer) >= routers_.size()) return false;
    const Router & router = routers_[static_cast<size_t>(layer)];
    if (router.weights.empty()) return false;
    const auto dot = type_traits(host().type_f32).vec_dot;
    const auto experts = static_cast<size_t>(experts_);
    for (size_t e = 0; e < experts; ++e) {
        dot(static_cast<int>(width_), &scores_[e], 0, &router.weights[e * width_], 0, input, 0, 1);
        if (!router.bias.empty()) scores_[e] += router.bias[e];
    }
    if (!router.selection_bias.empty()) {
        const float most = *std::max_element(scores_.begin(), scores_.end());
        float sum = 0;
        for (float & score : scores_) {
            score = router.sigmoid ? 1.0F / (1.0F + std::exp(-score)) : std::exp(score - most);
            sum += score;
        }
        for (size_t e = 0; e < experts; ++e)
            scores_[e] = (router.sigmoid ? scores_[e] : scores_[e] / sum) + router.selection_bias[e];
    }
    std::iota(order_.begin(), order_.end(), 0);
    std::partial_sort(order_.begin(), order_.begin() + used_, order_.end(), [&](int32_t a, int32_t b) {
        const float x = scores_[static_cast<size_t>(a)], y = scores_[static_cast<size_t>(b)];
        return x > y || (x == y && a < b);
    });
    std::copy_n(order_.begin(), used_, chosen);
    return true;
}

bool Lookahead::trusted(int layer) const {
    const auto l = static_cast<size_t>(layer);
    return checks_[l] >= kChecks && agreed_[l] * 100 >= checks_[l] * used_ * kTrustedPercent;
}

bool Lookahead::hopeless(int layer) const {
    const auto l = static_cast<size_t>(layer);
    return routers_[l].weights.empty() || (checks_[l] >= kChecks && !trusted(layer));
}

void Lookahead::check(int layer, const float * input, const int32_t * chosen) {
    const auto l = static_cast<size_t>(layer);
    if (checks_[l] >= kChecks || !choose(layer, input, own_.data())) return;
    ++checks_[l];
    for (const int32_t e : own_) agreed_[l] += std::find(chosen, chosen + used_, e) != chosen + used_;
}

}  // namespace edgellm
