// edgellm._kernels: the native code, as Python sees it.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <vector>

#include "buffer_type.h"
#include "expert_buffer.h"
#include "host.h"
#include "modules.h"
#include "packed.h"
#include "sampler.h"

namespace nb = nanobind;
using namespace nb::literals;
using Bytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<nb::numpy, float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

namespace {

template <class Array, class T> Array owned(std::vector<T> * data, std::initializer_list<size_t> shape) {
    nb::capsule owner(data, [](void * p) noexcept { delete static_cast<std::vector<T> *>(p); });
    return Array(data->data(), shape, owner);
}

const edgellm::TypeInfo & checked(int type, int64_t columns, int64_t rows) {
    if (!edgellm::can_pack(type, columns, rows)) throw std::invalid_argument("no matrix of this type and shape can be packed");
    return *edgellm::type_info(type);
}

void check_packed(int type, int64_t columns, int64_t rows, const Bytes & packed) {
    checked(type, columns, rows);
    if (packed.size() != edgellm::packed_size(type, columns, rows)) throw std::invalid_argument("the packed matrix has another size");
}

Bytes pack(int type, int64_t columns, int64_t rows, const Bytes & source) {
    const edgellm::TypeInfo & info = checked(type, columns, rows);
    if (source.size() != static_cast<size_t>(rows * (columns / info.source_columns) * info.source_bytes))
        throw std::invalid_argument("the matrix has another size");
    auto * out = new std::vector<uint8_t>(edgellm::packed_size(type, columns, rows));
    edgellm::pack(type, columns, rows, source.data(), out->data());
    return owned<Bytes>(out, {out->size()});
}

Floats unpack(int type, int64_t columns, int64_t rows, const Bytes & packed) {
    check_packed(type, columns, rows, packed);
    auto * out = new std::vector<float>(static_cast<size_t>(rows * columns));
    for (int64_t row = 0; row < rows; ++row)
        edgellm::unpack_row(type, columns, packed.data(), row, out->data() + row * columns);
    return owned<Floats>(out, {static_cast<size_t>(rows), static_cast<size_t>(columns)});
}

const edgellm::Kernels & kernels_named(const std::string & name) {
    for (const edgellm::Kernels * k : edgellm::available_kernels())
        if (name == k->name) return *k;
    throw std::invalid_argument("this processor has no kernels named " + name);
}

Floats multiply(int type, int64_t rows, const Bytes & packed, const Floats & input, const std::string & name) {
    const auto n = static_cast<int64_t>(input.shape(0)), columns = static_cast<int64_t>(input.shape(1));
    check_packed(type, columns, rows, packed);
    const edgellm::Kernels & kernels = kernels_named(name);
    const size_t row_bytes = edgellm::activation_bytes(type, columns);
    std::vector<uint8_t> activations(static_cast<size_t>(n) * row_bytes);
    auto * result = new std::vector<float>(static_cast<size_t>(n * rows));
    for (int64_t i = 0; i < n;) {
        const int tile = edgellm::next_tile(n - i);
        const float * in[edgellm::kMaxTile];
        float * out[edgellm::kMaxTile];
        for (int k = 0; k < tile; ++k) in[k] = input.data() + (i + k) * columns;
        uint8_t * rounded = activations.data() + static_cast<size_t>(i) * row_bytes;
        kernels.round(type, columns, tile, in, rounded, 0, columns / edgellm::kBlock);
        for (int64_t g = 0; g < rows / edgellm::kRows; ++g) {
            for (int k = 0; k < tile; ++k) out[k] = result->data() + (i + k) * rows + g * edgellm::kRows;
            kernels.multiply(type, columns, tile, packed.data() + g * edgellm::packed_size(type, columns, edgellm::kRows), rounded, out);
        }
        i += tile;
    }
    return owned<Floats>(result, {static_cast<size_t>(n), static_cast<size_t>(rows)});
}

void set_host(const nb::dict & functions, const nb::dict & numbers) {
    const auto address = [&](const char * name) { return reinterpret_cast<void *>(nb::cast<uintptr_t>(functions[name])); };
    const auto number = [&](const char * name) { return nb::cast<int32_t>(numbers[name]); };
    edgellm::Host host{};
    host.extra_buffer_types = address("extra_buffer_types");
    host.buffer_init = address("buffer_init");
    host.barrier = address("barrier");
    host.chunk_set = address("chunk_set");
    host.chunk_add = address("chunk_add");
    host.type_traits = address("type_traits");
    host.row_size = address("row_size");
    host.device = address("device");
    host.op_mul_mat = number("MUL_MAT");
    host.op_mul_mat_id = number("MUL_MAT_ID");
    host.op_get_rows = number("GET_ROWS");
    host.op_attention = number("FLASH_ATTN_EXT");
    host.type_f32 = number("f32");
    host.type_f16 = number("f16");
    host.type_i32 = number("i32");
    edgellm::set_host(host);
}

void install_experts(const std::optional<std::string> & kernels) {
    edgellm::install_experts(kernels ? &kernels_named(*kernels) : nullptr);
}

// The arguments are those of edgellm.backend.sampler.SamplingParams, which checks them.
void make_sampler(edgellm::Sampler * self, int32_t n_vocab, float temperature, int32_t top_k, float top_p, float min_p,
                  float typical_p, float repetition_penalty, int32_t repetition_window, float presence_penalty,
                  float frequency_penalty, const std::vector<std::pair<int32_t, float>> & bias, uint64_t seed) {
    if (n_vocab <= 0) throw std::invalid_argument("a vocabulary has at least one token");
    edgellm::SamplerParams params;
    params.temperature = temperature;
    params.top_k = top_k;
    params.top_p = top_p;
    params.min_p = min_p;
    params.typical_p = typical_p;
    params.repetition_penalty = repetition_penalty;
    params.repetition_window = repetition_window;
    params.presence_penalty = presence_penalty;
    params.frequency_penalty = frequency_penalty;
    params.seed = seed;
    new (self) edgellm::Sampler(n_vocab, params, bias);
}

}  // namespace

NB_MODULE(_kernels, m) {
    m.doc() = "Native code: packed weights (kernels/packed.h), paged experts (kernels/expert_store.h), sampling.";
    m.def("kernels", [] {
        nb::list names;
        for (const edgellm::Kernels * k : edgellm::available_kernels()) names.append(k->name);
        return names;
    }, "Names of the kernels that this processor runs, the fastest first.");
    m.def("types", [] {
        nb::dict types;
        for (const edgellm::TypeInfo & info : edgellm::packable_types()) types[info.name] = static_cast<int>(info.type);
        return types;
    }, "Tensor types that can be packed: names and ggml's numbers.");
    m.def("set_host", &set_host, "functions"_a, "numbers"_a,
          "What is called in llama.cpp, and its numbers. Once a process, before the first model is loaded.");
    m.def("install_packing", [](const std::string & kernels) { edgellm::install_packing(kernels_named(kernels)); }, "kernels"_a,
          "Puts packed weights before ggml's own kinds. Once a process, after set_host.");
    m.def("install_experts", &install_experts, "kernels"_a.none(),
          "Puts paged experts before ggml's own kinds. Once a process, after set_host; None: no packed experts.");
    m.def("set_packing", &edgellm::set_packing, "on"_a, "Whether models that this thread loads from now on are packed.");
    m.def("packed_bytes", &edgellm::packed_bytes, "Bytes of packed weights in memory.");
    m.def("can_pack", &edgellm::can_pack, "type"_a, "columns"_a, "rows"_a, "Whether such a matrix can be packed.");
    m.def("packed_size", [](int type, int64_t columns, int64_t rows) {
        checked(type, columns, rows);
        return edgellm::packed_size(type, columns, rows);
    }, "type"_a, "columns"_a, "rows"_a, "Bytes of such a matrix, packed.");
    m.def("pack", &pack, "type"_a, "columns"_a, "rows"_a, "source"_a, "A matrix as it stands in a GGUF file, packed.");
    m.def("unpack", &unpack, "type"_a, "columns"_a, "rows"_a, "packed"_a, "A packed matrix as floats, (rows, columns).");
    nb::class_<edgellm::Sampler>(m, "Sampler", "Draws tokens (kernels/sampler.h).")
        .def("__init__", &make_sampler, "n_vocab"_a, nb::kw_only(), "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a,
             "typical_p"_a, "repetition_penalty"_a, "repetition_window"_a, "presence_penalty"_a, "frequency_penalty"_a,
             "bias"_a, "seed"_a)
        .def("draw", [](edgellm::Sampler & self, uintptr_t logits, const std::vector<int32_t> & refused) {
            return self.draw(reinterpret_cast<const float *>(logits), refused);
        }, "logits"_a, "refused"_a, "A token; -1 if none is left, -2 if the logits are no numbers. `logits` is an address.")
        .def("accept", &edgellm::Sampler::accept, "token"_a, "The token belongs to the answer.")
        .def("remember", &edgellm::Sampler::remember, "token"_a, "The token belongs to the prompt.");
    m.def("multiply", &multiply, "type"_a, "rows"_a, "packed"_a, "input"_a, "kernels"_a,
          "input (n, columns) by a packed matrix, (n, rows), on one thread.");
    edgellm::bind_pair_table(m);
    edgellm::bind_residency(m);
    edgellm::bind_experts(m);
    edgellm::bind_narrow(m);
    edgellm::bind_training(m);
    edgellm::bind_attention(m);
}
