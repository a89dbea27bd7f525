// edgellm._kernels.ExpertStore: experts paged from flash, as Python sees them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <vector>

#include "crc32c.h"
#include "expert_buffer.h"
#include "expert_store.h"
#include "modules.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edgellm {
namespace {

// The arguments are those of edgellm.backend.experts.ExpertStore, which checks them.
void make_store(ExpertStore * self, int layers, int experts, const std::vector<ExpertSlice> & slices,
                const std::vector<std::string> & files, const std::vector<int> & pools, const std::vector<int> & slots,
                size_t stream_bytes, int readers, bool direct, const std::vector<uint32_t> & checksums,
                const std::vector<uint8_t> & trial_widths) {
    if (layers <= 0 || experts <= 0 || readers <= 0) throw std::invalid_argument("layers, experts and readers are positive");
    if (pools.size() != static_cast<size_t>(layers)) throw std::invalid_argument("every layer has a pool");
    new (self) ExpertStore({layers, experts, slices, files, pools, slots, stream_bytes, readers, direct, checksums, trial_widths});
}

template <class T> nb::ndarray<nb::numpy, T, nb::ndim<1>> owned(std::vector<T> * data) {
    nb::capsule owner(data, [](void * p) noexcept { delete static_cast<std::vector<T> *>(p); });
    return nb::ndarray<nb::numpy, T, nb::ndim<1>>(data->data(), {data->size()}, owner);
}

nb::dict stats_of(ExpertStore & self) {
    const ExpertStats s = self.stats();
    nb::dict d;
    d["visits"] = s.visits;
    d["needed"] = s.needed;
    d["hits"] = s.hits;
    d["loads"] = s.loads;
    d["streamed"] = s.streamed;
    d["prefetched"] = s.prefetched;
    d["prefetch_used"] = s.prefetch_used;
    d["prefetch_wasted"] = s.prefetch_wasted;
    d["reads"] = s.reads;
    d["bytes"] = s.bytes;
    d["stall_ns"] = s.stall_ns;
    d["read_ns"] = s.read_ns;
    return d;
}

// One multiplication's reads without a multiplication: what each expert's matrix is in memory. For tests.
nb::list fetch(ExpertStore & self, const std::string & name, const std::vector<int32_t> & experts) {
    const ExpertSlice * slice = self.slice(name);
    if (slice == nullptr) throw std::invalid_argument("no tensor is called " + name);
    nb::list found;
    self.begin(*slice, experts.data(), experts.size());
    do {
        for (const ExpertStore::Task & task : self.wave()) {
            bool there;
            {
                nb::gil_scoped_release release;
                there = self.wait(task, true);
            }
            if (there) found.append(nb::make_tuple(task.expert, nb::bytes(reinterpret_cast<const char *>(task.data), slice->memory_bytes())));
        }
    } while (!self.failed() && self.next());
    return found;
}

void check_experts(ExpertStore & self, int layer, const std::vector<int32_t> & experts) {
    if (layer < 0 || layer >= self.params().layers) throw std::invalid_argument("no such layer");
    for (const int32_t e : experts)
        if (e < 0 || e >= self.params().experts) throw std::invalid_argument("no such expert");
}

using Weights = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using RouterParts = std::tuple<Weights, Weights, Weights, bool>;

void set_routers(ExpertStore & self, const std::vector<RouterParts> & parts, int used, size_t width) {
    const auto experts = static_cast<size_t>(self.params().experts);
    if (parts.size() != static_cast<size_t>(self.params().layers)) throw std::invalid_argument("every layer has a router");
    if (used <= 0 || static_cast<size_t>(used) > experts) throw std::invalid_argument("no layer uses so many experts");
    const auto copied = [](const Weights & a, size_t size) {
        if (a.size() != 0 && a.size() != size) throw std::invalid_argument("a router has another shape");
        return std::vector<float>(a.data(), a.data() + a.size());
    };
    std::vector<Router> routers;
    for (const auto & [weights, bias, selection, sigmoid] : parts)
        routers.push_back({copied(weights, experts * width), copied(bias, experts), copied(selection, experts), sigmoid});
    self.set_lookahead(std::make_unique<Lookahead>(self.params().experts, used, width, std::move(routers)));
}

}  // namespace

void bind_experts(nb::module_ & m) {
    nb::class_<ExpertSlice>(m, "ExpertSlice", "One stacked tensor of a MoE layer.")
        .def("__init__", [](ExpertSlice * self, std::string name, int32_t type, int64_t columns, int64_t rows, int layer, int file,
                            uint64_t offset, uint64_t bytes, bool packed, std::vector<uint64_t> offsets, const nb::bytes & widths) {
            const auto * first = reinterpret_cast<const uint8_t *>(widths.c_str());
            new (self) ExpertSlice{std::move(name), type, columns, rows, layer, 0, file, offset, bytes, packed, std::move(offsets),
                                   std::vector<uint8_t>(first, first + widths.size())};
        }, "name"_a, nb::kw_only(), "type"_a, "columns"_a, "rows"_a, "layer"_a, "file"_a, "offset"_a, "bytes"_a, "packed"_a,
             "offsets"_a, "widths"_a)
        .def_prop_ro("extent", &slice_extent, "Bytes of memory for one expert's matrix, in a slot or a cell.");
    nb::class_<ExpertStore>(m, "ExpertStore", "Experts that are read from files when they are needed (kernels/expert_store.h).")
        .def("__init__", &make_store, nb::kw_only(), "layers"_a, "experts"_a, "slices"_a, "files"_a, "pools"_a, "slots"_a,
             "stream_bytes"_a, "readers"_a, "direct"_a, "checksums"_a, "trial_widths"_a)
        .def("stats", &stats_of)
        .def_prop_ro("resident_bytes", &ExpertStore::resident_bytes)
        .def_prop_ro("failed", &ExpertStore::failed)
        .def_prop_ro("deleted", &ExpertStore::deleted)
        .def_prop_ro("direct", &ExpertStore::direct)
        .def_prop_ro("claimed", &ExpertStore::claimed, "(layers,): whether llama.cpp has placed the layer here.")
        .def_prop_ro("refused", &ExpertStore::refused, "A tensor that llama.cpp uses in a way that cannot be paged, or nothing.")
        .def("take_error", &ExpertStore::take_error, nb::call_guard<nb::gil_scoped_release>())
        .def("prefetch", [](ExpertStore & self, int layer, const std::vector<int32_t> & experts, int limit) {
            check_experts(self, layer, experts);
            self.prefetch(layer, experts.data(), experts.size(), limit);
        }, "layer"_a, "experts"_a, "limit"_a)
        .def("preload", [](ExpertStore & self, int layer, const std::vector<int32_t> & experts) {
            check_experts(self, layer, experts);
            self.preload(layer, experts.data(), experts.size());
        }, "layer"_a, "experts"_a)
        .def("set_routers", &set_routers, "routers"_a, "used"_a, "width"_a,
             "Routers as (weights, bias, selection bias, sigmoid), one for each layer; weights of no size: not known.")
        .def_prop_ro("table", &ExpertStore::table, nb::rv_policy::reference_internal)
        .def_prop_ro("predictor", [](const ExpertStore & self) {
            const char * names[] = {"none", "routers", "table"};
            return names[static_cast<size_t>(self.predictor())];
        })
        .def("set_ahead", &ExpertStore::set_ahead, "on"_a, "Whether experts are read ahead, from the next step on.")
        .def("set_route", &ExpertStore::set_route, "route"_a, "foreseen"_a,
             "For benchmarks: experts, (layers * used,), in place of the routers' choice and of look-ahead's.")
        .def("set_log", &ExpertStore::set_log, "on"_a)
        .def("take_log", [](ExpertStore & self) { return owned(new std::vector<int32_t>(self.take_log())); })
        .def("counts", [](ExpertStore & self) { return owned(new std::vector<uint32_t>(self.counts())); })
        .def_prop_ro("reads", &ExpertStore::reads)
        .def("fetch", &fetch, "name"_a, "experts"_a);
    m.def("reader_bytes", [](const std::vector<ExpertSlice> & slices, int experts) {
        const ReaderBytes most = reader_bytes(slices, experts);
        return most.bounce + most.wide;
    }, "slices"_a, "experts"_a, "Memory that a reader takes for what it does not read straight into its place.");
    m.def("crc32c", [](const nb::bytes & data) { return crc32c(reinterpret_cast<const uint8_t *>(data.c_str()), data.size()); },
          "data"_a, "CRC-32C of bytes.");
    m.def("set_expert_store", &set_expert_store, "store"_a.none(),
          "Where the expert tensors of models that this thread loads from now on lie; None: in memory.");
}

}  // namespace edgellm
