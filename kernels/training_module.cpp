// What training computes natively, as Python sees it (edgellm/backend/training.py, which shares it out to threads).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "modules.h"
#include "training.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edgellm {

const std::vector<const TrainingSet *> & available_training() {
    static const std::vector<const TrainingSet *> found = [] {
        std::vector<const TrainingSet *> list;
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool fused = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        if (fused && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            list.push_back(&kTrainingAvx512);
        if (fused) list.push_back(&kTrainingAvx2);
#endif
        list.push_back(&kTrainingPortable);
        return list;
    }();
    return found;
}

namespace {

// Arrays are taken as they are: one of another type or layout is refused, not copied.
template <class T> using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

template <class T> const TrainingKernels<T> & kernels_of(const TrainingSet & set) {
    if constexpr (std::is_same_v<T, float>)
        return set.floats;
    else
        return set.halves;
}

template <class T> const TrainingKernels<T> & named(const std::string & name) {
    for (const TrainingSet * set : available_training())
        if (name == set->name) return kernels_of<T>(*set);
    throw std::invalid_argument("this processor has no kernels named " + name);
}

void check(bool fits) {
    if (!fits) throw std::invalid_argument("arrays of sizes that do not belong together");
}

template <class A> int64_t size(const A & array) { return static_cast<int64_t>(array.size()); }

// Rows of `columns` elements in an array.
template <class A> int64_t rows_of(const A & array, int64_t columns) {
    check(columns > 0 && size(array) % columns == 0);
    return size(array) / columns;
}

template <class T>
void norm(const std::string & name, const Array<const float> & x, const Array<const float> & weight, float epsilon,
          const Array<T> & y, const Array<float> & scale) {
    const auto & kernels = named<T>(name);
    const int64_t rows = rows_of(x, size(weight));
    check(size(y) == size(x) && size(scale) == rows);
    nb::gil_scoped_release release;
    kernels.norm(rows, size(weight), x.data(), weight.data(), epsilon, y.data(), scale.data());
}

template <class T>
void norm_back(const std::string & name, const Array<const T> & dy, const Array<const float> & x,
               const Array<const float> & weight, const Array<const float> & scale, const Array<float> & dx) {
    const auto & kernels = named<T>(name);
    const int64_t rows = rows_of(x, size(weight));
    check(size(dy) == size(x) && size(dx) == size(x) && size(scale) == rows);
    nb::gil_scoped_release release;
    kernels.norm_back(rows, size(weight), dy.data(), x.data(), weight.data(), scale.data(), dx.data());
}

template <class T>
void gate(const std::string & name, const Array<const T> & gate, const Array<const T> & up, bool gelu, const Array<T> & y) {
    const auto & kernels = named<T>(name);
    check(size(up) == size(gate) && size(y) == size(gate));
    nb::gil_scoped_release release;
    kernels.gate(size(gate), gate.data(), up.data(), gelu, y.data());
}

template <class T>
void gate_back(const std::string & name, const Array<const T> & dy, const Array<const T> & gate, const Array<const T> & up,
               bool gelu, const Array<T> & dgate, const Array<T> & dup) {
    const auto & kernels = named<T>(name);
    const int64_t n = size(gate);
    check(size(dy) == n && size(up) == n && size(dgate) == n && size(dup) == n);
    nb::gil_scoped_release release;
    kernels.gate_back(n, dy.data(), gate.data(), up.data(), gelu, dgate.data(), dup.data());
}

// (tokens, heads, width) and grouped heads, one of which is `to`; back: from grouped heads.
template <class T>
void turn(const std::string & name, const Array<const T> & from, const Array<const float> & cosine,
          const Array<const float> & sine, int64_t heads, int64_t share, bool interleaved, bool back, int64_t first,
          int64_t last, const Array<T> & to) {
    const auto & kernels = named<T>(name);
    check(heads > 0 && share > 0 && heads % share == 0 && cosine.ndim() > 0);
    const auto tokens = static_cast<int64_t>(cosine.shape(0));
    const int64_t width = rows_of(from, std::max<int64_t>(1, tokens * heads));
    const int64_t pairs = rows_of(cosine, std::max<int64_t>(1, tokens));
    check(size(sine) == size(cosine) && size(to) == size(from) && 2 * pairs <= width);
    check(0 <= first && first <= last && last <= tokens && size(from) == tokens * heads * width);
    const Turning how = {tokens, heads, width, share, pairs, interleaved};
    nb::gil_scoped_release release;
    (back ? kernels.turn_back : kernels.turn)(how, first, last, from.data(), cosine.data(), sine.data(), to.data());
}

template <class A> Scores scores_of(const A & scores, int64_t share, int64_t past, int64_t window, float scale) {
    check(scores.ndim() == 3 && share > 0 && past >= 0 && window >= 0);
    const auto at = [&](size_t axis) { return static_cast<int64_t>(scores.shape(axis)); };
    check(at(1) > 0 && past + (at(1) - 1) / share + 1 <= at(2));
    return {at(0), at(1), at(2), share, past, window, scale};
}

template <class T>
void softmax(const std::string & name, int64_t share, int64_t past, int64_t window, float scale, int64_t first, int64_t last,
             const Array<T> & scores) {
    const auto & kernels = named<T>(name);
    const Scores of = scores_of(scores, share, past, window, scale);
    check(0 <= first && first <= last && last <= of.groups * of.rows);
    nb::gil_scoped_release release;
    kernels.softmax(of, first, last, scores.data());
}

template <class T>
void softmax_back(const std::string & name, int64_t share, int64_t past, int64_t window, float scale, int64_t first,
                  int64_t last, const Array<const T> & weights, const Array<T> & gradient) {
    const auto & kernels = named<T>(name);
    const Scores of = scores_of(gradient, share, past, window, scale);
    check(0 <= first && first <= last && last <= of.groups * of.rows && size(weights) == size(gradient));
    nb::gil_scoped_release release;
    kernels.softmax_back(of, first, last, weights.data(), gradient.data());
}

template <class T>
void losses(const std::string & name, const Array<T> & logits, const Array<const int64_t> & targets, bool gradient,
            const Array<float> & found, const Array<bool> & correct) {
    const auto & kernels = named<T>(name);
    const int64_t rows = size(targets);
    check(logits.ndim() == 2 && static_cast<int64_t>(logits.shape(0)) == rows && size(found) == rows && size(correct) == rows);
    const auto columns = static_cast<int64_t>(logits.shape(1));
    for (int64_t row = 0; row < rows; ++row) check(0 <= targets.data()[row] && targets.data()[row] < columns);
    nb::gil_scoped_release release;
    kernels.losses(rows, columns, logits.data(), targets.data(), gradient, found.data(), correct.data());
}

template <class T> void bind(nb::module_ & m) {
    m.def("training_norm", &norm<T>, "kernels"_a, "x"_a.noconvert(), "weight"_a.noconvert(), "epsilon"_a, "y"_a.noconvert(),
          "scale"_a.noconvert());
    m.def("training_norm_back", &norm_back<T>, "kernels"_a, "dy"_a.noconvert(), "x"_a.noconvert(), "weight"_a.noconvert(),
          "scale"_a.noconvert(), "dx"_a.noconvert());
    m.def("training_gate", &gate<T>, "kernels"_a, "gate"_a.noconvert(), "up"_a.noconvert(), "gelu"_a, "y"_a.noconvert());
    m.def("training_gate_back", &gate_back<T>, "kernels"_a, "dy"_a.noconvert(), "gate"_a.noconvert(), "up"_a.noconvert(),
          "gelu"_a, "dgate"_a.noconvert(), "dup"_a.noconvert());
    m.def("training_turn", &turn<T>, "kernels"_a, "source"_a.noconvert(), "cosine"_a.noconvert(), "sine"_a.noconvert(),
          "heads"_a, "share"_a, "interleaved"_a, "back"_a, "first"_a, "last"_a, "target"_a.noconvert());
    m.def("training_softmax", &softmax<T>, "kernels"_a, "share"_a, "past"_a, "window"_a, "scale"_a, "first"_a, "last"_a,
          "scores"_a.noconvert());
    m.def("training_softmax_back", &softmax_back<T>, "kernels"_a, "share"_a, "past"_a, "window"_a, "scale"_a, "first"_a,
          "last"_a, "weights"_a.noconvert(), "gradient"_a.noconvert());
    m.def("training_losses", &losses<T>, "kernels"_a, "logits"_a.noconvert(), "targets"_a.noconvert(), "gradient"_a,
          "losses"_a.noconvert(), "correct"_a.noconvert());
}

}  // namespace

void bind_training(nb::module_ & m) {
    m.def("training_kernels", [] {
        nb::list names;
        for (const TrainingSet * set : available_training()) names.append(set->name);
        return names;
    }, "Names of the kernels of training on this processor, the fastest first.");
    bind<float>(m);
    bind<uint16_t>(m);
}

}  // namespace edgellm
