// Narrow weights, as Python sees them (edgellm/backend/narrow.py).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "modules.h"
#include "narrow.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edgellm {
namespace {

using Input = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Bytes of the matrix in a file. Throws std::invalid_argument for a type or shape that cannot be narrowed.
size_t checked(int32_t type, int64_t columns, int64_t rows, const std::vector<int> & bits) {
    constexpr int64_t kMost = int64_t{1} << 40;
    const CodedType * coded = coded_type(type);
    for (const int b : bits)
        if (!can_narrow(type, b)) throw std::invalid_argument("this type cannot be stored with so many bits");
    if (coded == nullptr || columns <= 0 || rows <= 0 || columns % coded->columns != 0 || columns > kMost / rows)
        throw std::invalid_argument("no matrix of this type and shape can be narrowed");
    return static_cast<size_t>(columns / coded->columns * rows) * static_cast<size_t>(coded->bytes);
}

void check_size(size_t given, size_t expected) {
    if (given != expected) throw std::invalid_argument("the matrix has another size");
}

size_t size(int32_t type, int64_t columns, int64_t rows, int bits) {
    checked(type, columns, rows, {bits});
    return narrow_size(type, columns, rows, bits);
}

void narrow_into(int32_t type, int64_t columns, int64_t rows, int bits, const Input & source, const Output & stored) {
    check_size(source.size(), checked(type, columns, rows, {bits}));
    check_size(stored.size(), narrow_size(type, columns, rows, bits));
    nb::gil_scoped_release release;
    narrow(type, columns, rows, bits, source.data(), stored.data());
}

void widen_into(int32_t type, int64_t columns, int64_t rows, int bits, const Input & stored, const Output & source,
                const std::string & kernels) {
    check_size(source.size(), checked(type, columns, rows, {bits}));
    check_size(stored.size(), narrow_size(type, columns, rows, bits));
    for (const Wideners * wideners : available_wideners())
        if (kernels == wideners->name) {
            nb::gil_scoped_release release;
            return widen_with(*wideners, type, columns, rows, bits, stored.data(), source.data());
        }
    throw std::invalid_argument("this processor has no kernels named " + kernels);
}

std::vector<double> errors(int32_t type, int64_t columns, int64_t rows, const std::vector<int> & bits, const Input & source) {
    check_size(source.size(), checked(type, columns, rows, bits));
    nb::gil_scoped_release release;
    return narrow_errors(type, columns, rows, bits, source.data());
}

}  // namespace

void bind_narrow(nb::module_ & m) {
    m.def("code_bits", &code_bits, "type"_a, "Bits of the type's codes; 0 for a type that cannot be narrowed.");
    m.def("can_narrow", &can_narrow, "type"_a, "bits"_a, "Whether matrices of the type can be stored with so many bits.");
    m.def("narrow_size", &size, "type"_a, "columns"_a, "rows"_a, "bits"_a, "Bytes of such a matrix, narrowed.");
    m.def("narrow", &narrow_into, "type"_a, "columns"_a, "rows"_a, "bits"_a, "source"_a, "stored"_a,
          "Narrows `source`, as it stands in a GGUF file, into `stored`.");
    m.def("wideners", [] {
        nb::list names;
        for (const Wideners * wideners : available_wideners()) names.append(wideners->name);
        return names;
    }, "Names of the kernels that widen on this processor, the fastest first.");
    m.def("widen", &widen_into, "type"_a, "columns"_a, "rows"_a, "bits"_a, "stored"_a, "source"_a, "kernels"_a,
          "Expands `stored` into `source`, as a GGUF file would have it.");
    m.def("narrow_errors", &errors, "type"_a, "columns"_a, "rows"_a, "bits"_a, "source"_a,
          "Squared error over squared norm of the weights, for each number of bits.");
}

}  // namespace edgellm
