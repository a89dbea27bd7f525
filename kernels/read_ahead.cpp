// What is read ahead for the next layer while this one is computed.
//
// The experts of the next layer are foreseen by its router (lookahead.h), and where there is none that can be relied on,
// by what has followed this layer's experts before (pair_table.h). A step of many tokens needs nearly all.
#include "read_ahead.h"

#include <algorithm>
#include <vector>

namespace edgellm {
namespace {

using namespace ggml;
using Predictor = ExpertStore::Predictor;

constexpr size_t kFewTokens = 16;  // up to so many, each one's routing is foreseen
constexpr int kWideAhead = 8;      // experts that are read ahead at once for a step of many tokens
constexpr int kMostDistant = 2;    // layers ahead that are logged

struct Shape {
    size_t tokens, used;
};

// nullptr if what is multiplied is not the routers' input.
Lookahead * routers_of(const Tensor * op, ExpertStore & store) {
    const Tensor *input = op->src[1], *ids = op->src[2];
    Lookahead * routers = store.lookahead();
    const bool fits = routers != nullptr && input->ne[1] == 1 && routers->width() == static_cast<size_t>(input->ne[0]) &&
                      routers->used() == ids->ne[0];
    return fits ? routers : nullptr;
}

// What the layer uses: what its router chose, or what stands in its place.
void take(const Tensor * op, int layer, ExpertStore & store, Plan & plan, Shape shape) {
    const int32_t * route = store.route(layer, shape.used);
    plan.taken.resize(shape.tokens * shape.used);
    for (size_t token = 0; token < shape.tokens; ++token)
        for (size_t k = 0; k < shape.used; ++k)
            plan.taken[token * shape.used + k] =
                route != nullptr ? route[k] : id_at(op->src[2], static_cast<int64_t>(k), static_cast<int64_t>(token));
}

void write_log(const Tensor * op, int layer, ExpertStore & store, Lookahead * routers) {
    const Tensor *input = op->src[1], *ids = op->src[2];
    std::vector<int32_t> chosen(static_cast<size_t>(ids->ne[0]));
    for (int64_t token = 0; token < ids->ne[1]; ++token) {
        for (int64_t k = 0; k < ids->ne[0]; ++k) chosen[static_cast<size_t>(k)] = id_at(ids, k, token);
        const auto at = static_cast<int32_t>(token);
        store.log(-1, layer, at, chosen.data(), static_cast<int>(chosen.size()));
        for (int distance = 0; routers != nullptr && distance <= kMostDistant; ++distance)
            if (routers->choose(layer + distance, input_row(input, {0, at}), chosen.data()))
                store.log(distance, layer + distance, at, chosen.data(), static_cast<int>(chosen.size()));
    }
}

// Many tokens need most experts of this layer: those of the next one will be needed, too.
void expect_all(int next, ExpertStore & store, Plan & plan) {
    const auto experts = static_cast<size_t>(store.params().experts);
    if (plan.needed.size() * 2 <= experts) return;
    plan.foreseen.resize(experts);
    for (size_t e = 0; e < experts; ++e) plan.foreseen[e] = static_cast<int32_t>(e);
    store.prefetch(next, plan.foreseen.data(), experts, kWideAhead);
}

// The next layer's experts for each token, the likeliest first, into plan.chosen, (tokens, used).
Predictor foresee(const Tensor * op, int next, ExpertStore & store, Lookahead * routers, Plan & plan, Shape shape) {
    plan.chosen.resize(shape.tokens * shape.used);
    if (routers != nullptr && routers->trusted(next - 1)) {
        bool known = true;
        for (size_t token = 0; known && token < shape.tokens; ++token)
            known = routers->choose(next, input_row(op->src[1], {0, static_cast<int32_t>(token)}), &plan.chosen[token * shape.used]);
        if (known) return Predictor::routers;
    } else if (routers != nullptr && !routers->hopeless(next - 1)) {
        return Predictor::none;  // its checks go on
    }
    if (store.table() == nullptr) return Predictor::none;
    for (size_t token = 0; token < shape.tokens; ++token) store.table()->predict(next, token, shape.used, &plan.chosen[token * shape.used]);
    return Predictor::table;
}

// Reads plan.chosen ahead: the first of every token, the second of every token ...
void read_chosen(int next, ExpertStore & store, Plan & plan, Shape shape) {
    plan.foreseen.clear();
    plan.ranks.clear();
    for (size_t k = 0; k < shape.used; ++k)
        for (size_t token = 0; token < shape.tokens; ++token) {
            const int32_t e = plan.chosen[token * shape.used + k];
            if (std::find(plan.foreseen.begin(), plan.foreseen.end(), e) != plan.foreseen.end()) continue;
            plan.foreseen.push_back(e);
            plan.ranks.push_back(static_cast<int32_t>(k));
        }
    store.prefetch(next, plan.foreseen.data(), plan.foreseen.size(), static_cast<int>(plan.foreseen.size()), plan.ranks.data());
}

}  // namespace

void read_ahead(const Tensor * op, int layer, ExpertStore & store, Plan & plan) {
    const Shape shape{static_cast<size_t>(op->src[2]->ne[1]), static_cast<size_t>(op->src[2]->ne[0])};
    Lookahead * routers = routers_of(op, store);
    if (store.log_on()) write_log(op, layer, store, routers);
    const int next = layer + 1;
    const bool ahead = store.ahead_on() && next < store.params().layers && store.idle();
    if (!ahead && store.table() == nullptr) return;
    take(op, layer, store, plan, shape);
    if (store.table() != nullptr) store.table()->observe(layer, plan.taken.data(), shape.tokens, shape.used);
    if (!ahead) return;
    if (const int32_t * known = store.foreseen(next, shape.used))
        return store.prefetch(next, known, shape.used, static_cast<int>(shape.used));
    if (routers != nullptr) routers->check(layer, input_row(op->src[1], {0, 0}), plan.taken.data());
    if (shape.tokens > kFewTokens) return expect_all(next, store, plan);
    const Predictor predictor = foresee(op, next, store, routers, plan, shape);
    if (predictor == Predictor::none) return;
    store.set_predictor(predictor);
    read_chosen(next, store, plan, shape);
}

}  // namespace edgellm
