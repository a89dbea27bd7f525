// Attention of a few rows, as Python sees it: for comparison with a reference.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <vector>

#include "attention.h"
#include "modules.h"
#include "packed.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edgellm {
namespace {

template <class T, int N> using Array = nb::ndarray<nb::numpy, T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

Array<float, 3> attend(const Array<float, 3> & query, const Array<uint16_t, 3> & keys, const Array<uint16_t, 3> & values,
                       const Array<uint16_t, 2> & mask, float scale) {
#if defined(__x86_64__)
    if (available_kernels().empty()) throw std::runtime_error("this processor has no kernels for attention");
    const size_t rows = query.shape(0), heads = query.shape(1), width = query.shape(2), cells = keys.shape(0);
    const size_t kv_heads = keys.shape(1), value_width = values.shape(2);
    const auto fits = [](size_t w) { return w % 8 == 0 && w > 0 && w <= static_cast<size_t>(kMostWidth); };
    if (!fits(width) || !fits(value_width) || cells % static_cast<size_t>(kBlockCells) != 0 || kv_heads == 0 ||
        heads % kv_heads != 0 || keys.shape(2) != width || values.shape(0) != cells || values.shape(1) != kv_heads ||
        mask.shape(0) != rows || mask.shape(1) != cells)
        throw std::invalid_argument("shapes that do not fit together, or are not known");
    Attention task{};
    task.rows = static_cast<int64_t>(rows);
    task.heads = static_cast<int64_t>(heads);
    task.kv_heads = static_cast<int64_t>(kv_heads);
    task.cells = static_cast<int64_t>(cells);
    task.key_width = static_cast<int64_t>(width);
    task.value_width = static_cast<int64_t>(value_width);
    task.query = reinterpret_cast<const char *>(query.data());
    task.query_row = heads * width * sizeof(float);
    task.query_head = width * sizeof(float);
    task.keys = reinterpret_cast<const char *>(keys.data());
    task.key_cell = kv_heads * width * 2;
    task.key_head = width * 2;
    task.values = reinterpret_cast<const char *>(values.data());
    task.value_cell = kv_heads * value_width * 2;
    task.value_head = value_width * 2;
    task.mask = reinterpret_cast<const char *>(mask.data());
    task.mask_row = cells * 2;
    task.scale = scale;
    auto * result = new std::vector<float>(rows * heads * value_width);
    std::vector<float> parts(static_cast<size_t>(part_floats(task)));
    task.result = result->data();
    task.parts = parts.data();
    std::vector<int32_t> seen(static_cast<size_t>(seen_numbers(task)));
    task.seen = seen.data();
    kAttentionAvx2.look(task, 0, task.rows);
    for (int64_t part = 0; part < part_count(task); ++part)
        for (int64_t head = 0; head < task.kv_heads; ++head) kAttentionAvx2.part(task, head, part);
    kAttentionAvx2.gather(task, 0, task.rows * task.heads);
    nb::capsule owner(result, [](void * p) noexcept { delete static_cast<std::vector<float> *>(p); });
    return Array<float, 3>(result->data(), {rows, heads, value_width}, owner);
#else
    throw std::runtime_error("this processor has no kernels for attention");
#endif
}

}  // namespace

void bind_attention(nb::module_ & m) {
    m.def("attend", &attend, "query"_a, "keys"_a, "values"_a, "mask"_a, "scale"_a,
          "Attention of query (rows, heads, width) over keys and values (cells, key and value heads, width), 16-bit floats "
          "as numbers; mask (rows, cells) likewise. Result (rows, heads, value width), on one thread.");
}

}  // namespace edgellm
