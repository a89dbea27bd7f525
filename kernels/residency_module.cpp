// The policy of the expert pager, as Python sees it (edgellm/moe/residency.py is the reference).
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "modules.h"
#include "residency.h"

namespace nb = nanobind;
using namespace nb::literals;
using edgellm::Residency;

namespace edgellm {

void bind_residency(nb::module_ & m) {
    nb::class_<Residency::Load>(m, "Load", "An expert to be read into a slot, and what lay there.")
        .def_ro("expert", &Residency::Load::expert)
        .def_ro("slot", &Residency::Load::slot)
        .def_ro("evicted_layer", &Residency::Load::evicted_layer)
        .def_ro("evicted_expert", &Residency::Load::evicted_expert);
    nb::class_<Residency>(m, "Residency", "Which expert lies in which slot (kernels/residency.h).")
        .def(nb::init<int, int, std::vector<int32_t>, const std::vector<int32_t> &>(), "layers"_a, "experts"_a, nb::kw_only(),
             "pools"_a, "slots"_a)
        .def_prop_ro("layers", &Residency::layers)
        .def_prop_ro("experts", &Residency::experts)
        .def("visit", [](Residency & self, int layer, const std::vector<int32_t> & experts) {
            return self.visit(layer, experts.data(), experts.size());
        }, "layer"_a, "experts"_a, "The layer needs these now: what is to be read, and where to.")
        .def("prefetch", [](Residency & self, int layer, const std::vector<int32_t> & experts, int64_t limit) {
            if (limit < 0) throw std::invalid_argument("a limit cannot be negative");
            return self.prefetch(layer, experts.data(), experts.size(), static_cast<size_t>(limit));
        }, "layer"_a, "experts"_a, "limit"_a, "The layer's next visit will probably need these, the likeliest first.")
        .def("preload", [](Residency & self, int layer, const std::vector<int32_t> & experts) {
            return self.preload(layer, experts.data(), experts.size());
        }, "layer"_a, "experts"_a, "Free slots are filled with these of the layer.")
        .def("slot_of", &Residency::slot_of, "layer"_a, "expert"_a, "The expert's slot, or -1.")
        .def("resident", &Residency::resident, "layer"_a, "The layer's experts that have a slot.")
        .def("set_busy", &Residency::set_busy, "pool"_a, "slot"_a, "busy"_a, "A busy slot is not evicted.")
        .def("forget", &Residency::forget, "layer"_a, "expert"_a, "The expert's slot is free again.");
}

}  // namespace edgellm
