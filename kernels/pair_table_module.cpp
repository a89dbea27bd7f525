// The table of experts that follow one another, as Python sees it (edgellm/moe/pair_table.py is the reference).
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "modules.h"
#include "pair_table.h"

namespace nb = nanobind;
using namespace nb::literals;
using edgellm::PairTable;

namespace edgellm {
namespace {

using Experts = std::vector<int32_t>;

void check_layer(const PairTable & table, int layer) {
    if (layer < 0 || layer >= table.layers()) throw std::invalid_argument("there is no such layer");
}

void observe_step(PairTable & self, int layer, const std::vector<Experts> & rows) {
    check_layer(self, layer);
    Experts all;
    for (const Experts & row : rows) {
        if (row.size() != rows[0].size()) throw std::invalid_argument("every token uses as many experts");
        for (const int32_t e : row)
            if (e < 0 || e >= self.experts()) throw std::invalid_argument("there is no such expert");
        all.insert(all.end(), row.begin(), row.end());
    }
    self.observe(layer, all.data(), rows.size(), rows.empty() ? 0 : rows[0].size());
}

Experts predict(PairTable & self, int layer, int count, int token) {
    check_layer(self, layer);
    if (count < 0 || count > self.experts() || token < 0) throw std::invalid_argument("there are not so many");
    Experts chosen(static_cast<size_t>(count));
    self.predict(layer, static_cast<size_t>(token), chosen.size(), chosen.data());
    return chosen;
}

nb::bytes state(const PairTable & self) {
    std::vector<uint8_t> state(self.state_bytes());
    self.save(state.data());
    return nb::bytes(state.data(), state.size());
}

void restore(PairTable & self, const nb::bytes & state) {
    if (state.size() != self.state_bytes()) throw std::invalid_argument("the table has another shape");
    self.restore(static_cast<const uint8_t *>(state.data()));
}

}  // namespace

void bind_pair_table(nb::module_ & m) {
    nb::class_<PairTable>(m, "PairTable", "Foresees experts from those of the layers before (kernels/pair_table.h).")
        .def(nb::init<int, int>(), "layers"_a, "experts"_a)
        .def("observe", [](PairTable & self, int layer, const Experts & experts) { observe_step(self, layer, {experts}); },
             "layer"_a, "experts"_a, "The layer used these for the only token of a step.")
        .def("observe_step", &observe_step, "layer"_a, "rows"_a, "The layer used these for each token of a step.")
        .def("predict", &predict, "layer"_a, "count"_a, "token"_a = 0, "The likeliest experts, the likeliest first.")
        .def("state", &state, "All that was learned.")
        .def("restore", &restore, "state"_a, "Takes over what `state` gave.");
}

}  // namespace edgellm
