// Which rows of activations each expert is multiplied by, out of what the router chose.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "ggml_abi.h"
#include "packed.h"

namespace edgellm {

// A row of activations that an expert is multiplied by: number `k` of the experts chosen for `token`.
struct Row {
    int32_t k, token;
};

struct Tile {
    int32_t first, count;  // rows
};

// What the threads of a multiplication share; filled in by the first of them. One graph of a store runs at a time.
struct Plan {
    std::vector<int32_t> needed, starts;  // experts; (experts + 1,) where each one's rows begin
    std::vector<Row> rows;
    std::vector<Tile> tiles;
    std::vector<int32_t> tile_starts;
    std::vector<int32_t> taken;                    // (tokens, used): the experts that this layer uses for each token
    std::vector<int32_t> chosen, foreseen, ranks;  // of the next layer
    bool usable = false;
};

inline const float * input_row(const ggml::Tensor * input, const Row & row) {
    return reinterpret_cast<const float *>(static_cast<const char *>(input->data) +
                                           static_cast<size_t>(row.k % input->ne[1]) * input->nb[1] +
                                           static_cast<size_t>(row.token) * input->nb[2]);
}

inline int32_t id_at(const ggml::Tensor * ids, int64_t k, int64_t token) {
    int32_t id;
    std::memcpy(&id, static_cast<const char *>(ids->data) + static_cast<size_t>(k) * ids->nb[0] + static_cast<size_t>(token) * ids->nb[1],
                sizeof id);
    return id;
}

// Sorts the rows by expert. False if the ids make no sense.
inline bool gather(const ggml::Tensor * op, Plan & plan, bool tiled, const int32_t * route) {
    const ggml::Tensor * ids = op->src[2];
    const auto id_of = [&](int64_t k, int64_t token) { return route != nullptr ? route[k] : id_at(ids, k, token); };
    const auto experts = static_cast<int32_t>(op->src[0]->ne[2]);
    plan.starts.assign(static_cast<size_t>(experts) + 1, 0);
    for (int64_t token = 0; token < ids->ne[1]; ++token)
        for (int64_t k = 0; k < ids->ne[0]; ++k) {
            const int32_t id = id_of(k, token);
            if (id < 0 || id >= experts) return false;
            ++plan.starts[static_cast<size_t>(id) + 1];
        }
    plan.needed.clear();
    for (int32_t e = 0; e < experts; ++e) {
        if (plan.starts[static_cast<size_t>(e) + 1] != 0) plan.needed.push_back(e);
        plan.starts[static_cast<size_t>(e) + 1] += plan.starts[static_cast<size_t>(e)];
    }
    plan.rows.resize(static_cast<size_t>(plan.starts.back()));
    std::vector<int32_t> at(plan.starts.begin(), plan.starts.end() - 1);
    for (int64_t token = 0; token < ids->ne[1]; ++token)
        for (int64_t k = 0; k < ids->ne[0]; ++k)
            plan.rows[static_cast<size_t>(at[static_cast<size_t>(id_of(k, token))]++)] = {static_cast<int32_t>(k),
                                                                                          static_cast<int32_t>(token)};
    plan.tiles.clear();
    plan.tile_starts.assign(static_cast<size_t>(experts) + 1, 0);
    if (!tiled) return true;
    for (int32_t e = 0; e < experts; ++e) {
        for (int32_t i = plan.starts[static_cast<size_t>(e)], end = plan.starts[static_cast<size_t>(e) + 1]; i < end;) {
            const int n = next_tile(end - i);
            plan.tiles.push_back({i, n});
            i += n;
        }
        plan.tile_starts[static_cast<size_t>(e) + 1] = static_cast<int32_t>(plan.tiles.size());
    }
    return true;
}

}  // namespace edgellm
