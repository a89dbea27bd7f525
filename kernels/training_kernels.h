// The kernels of training.h, as loops that compilers turn into vector instructions: compiled once for each instruction
// set, by a file that includes this one.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "training.h"

namespace {

using edgellm::Scores;
using edgellm::Turning;

inline float load(float x) { return x; }

inline float load(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

inline void store(float & place, float x) { place = x; }

// To the nearest, to even in the middle.
inline void store(uint16_t & place, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bool number = (bits & 0x7fffffff) <= 0x7f800000;
    place = static_cast<uint16_t>(number ? rounded : (bits >> 16) | 0x40);
}

// To about 2 units in the last place between -87 and 88, and as there beyond them. What is no number stays none.
inline float exponential(float x) {
    constexpr float kPerLog2 = 1.44269504f, kHigh = 0.693359375f, kLow = -2.12194440e-4f, kMost = 88.0f, kLeast = -87.0f;
    const float under = kMost < x ? kMost : x;
    const float y = under < kLeast ? kLeast : under;
    const float turns = y * kPerLog2;
    const auto whole = static_cast<int32_t>(turns + __builtin_copysignf(0.5f, turns));
    const auto n = static_cast<float>(whole);
    const float r = y - n * kHigh - n * kLow;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const uint32_t bits = (static_cast<uint32_t>(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// The value of an activation, and its slope.
struct Activated {
    float value, slope;
};

inline Activated silu(float x) {
    const float s = sigmoid(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
}

// With tanh: x / 2 * (1 + tanh(u)), u = c (x + a x^3), and (1 + tanh(u)) / 2 = sigmoid(2 u).
inline Activated tanh_gelu(float x) {
    constexpr float kRoot = 0.7978845608f, kCube = 0.044715f;
    const float s = sigmoid(2.0f * kRoot * (x + kCube * x * x * x));
    return {x * s, s + x * s * (1.0f - s) * 2.0f * kRoot * (1.0f + 3.0f * kCube * x * x)};
}

template <class T>
void norm(int64_t rows, int64_t columns, const float * x, const float * weight, float epsilon, T * y, float * scale) {
    for (int64_t row = 0; row < rows; ++row, x += columns, y += columns) {
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t c = 0; c < columns; ++c) squares += x[c] * x[c];
        const float s = 1.0f / std::sqrt(squares / static_cast<float>(columns) + epsilon);
        scale[row] = s;
        for (int64_t c = 0; c < columns; ++c) store(y[c], x[c] * s * weight[c]);
    }
}

template <class T>
void norm_back(int64_t rows, int64_t columns, const T * dy, const float * x, const float * weight, const float * scale,
               float * dx) {
    for (int64_t row = 0; row < rows; ++row, x += columns, dy += columns, dx += columns) {
        float along = 0;
#pragma omp simd reduction(+ : along)
        for (int64_t c = 0; c < columns; ++c) along += load(dy[c]) * weight[c] * x[c];
        const float s = scale[row];
        along *= s * s / static_cast<float>(columns);
        for (int64_t c = 0; c < columns; ++c) dx[c] = (load(dy[c]) * weight[c] - x[c] * along) * s;
    }
}

template <class T, class F> void gate_with(int64_t n, const T * gate, const T * up, T * y, F activation) {
    for (int64_t i = 0; i < n; ++i) store(y[i], activation(load(gate[i])).value * load(up[i]));
}

template <class T> void gate(int64_t n, const T * gate, const T * up, bool gelu, T * y) {
    if (gelu)
        gate_with(n, gate, up, y, [](float x) { return tanh_gelu(x); });
    else
        gate_with(n, gate, up, y, [](float x) { return silu(x); });
}

template <class T, class F>
void gate_back_with(int64_t n, const T * dy, const T * gate, const T * up, T * dgate, T * dup, F activation) {
    for (int64_t i = 0; i < n; ++i) {
        const Activated at = activation(load(gate[i]));
        const float gradient = load(dy[i]);
        store(dgate[i], gradient * load(up[i]) * at.slope);
        store(dup[i], gradient * at.value);
    }
}

template <class T>
void gate_back(int64_t n, const T * dy, const T * gate, const T * up, bool gelu, T * dgate, T * dup) {
    if (gelu)
        gate_back_with(n, dy, gate, up, dgate, dup, [](float x) { return tanh_gelu(x); });
    else
        gate_back_with(n, dy, gate, up, dgate, dup, [](float x) { return silu(x); });
}

template <class T>
inline void turn_head(const Turning & how, const T * x, const float * cosine, const float * sine, float direction, T * y) {
    const int64_t step = how.interleaved ? 2 : 1, apart = how.interleaved ? 1 : how.pairs;
    for (int64_t p = 0; p < how.pairs; ++p) {
        const float one = load(x[p * step]), two = load(x[p * step + apart]), s = direction * sine[p];
        store(y[p * step], one * cosine[p] - two * s);
        store(y[p * step + apart], two * cosine[p] + one * s);
    }
    const int64_t turned = 2 * how.pairs;
    std::memcpy(y + turned, x + turned, static_cast<size_t>(how.width - turned) * sizeof(T));
}

// `f` is called with where a head begins among heads in a row, where among grouped ones, and its token's angles.
template <class F> void each_head(const Turning & how, int64_t first, int64_t last, F f) {
    for (int64_t token = first; token < last; ++token)
        for (int64_t head = 0; head < how.heads; ++head) {
            const int64_t group = head / how.share, place = head % how.share;
            f((token * how.heads + head) * how.width,
              ((group * how.tokens + token) * how.share + place) * how.width, token * how.pairs);
        }
}

template <class T>
void turn(const Turning & how, int64_t first, int64_t last, const T * x, const float * cosine, const float * sine, T * y) {
    each_head(how, first, last, [&](int64_t in_row, int64_t grouped, int64_t angles) {
        turn_head(how, x + in_row, cosine + angles, sine + angles, 1.0f, y + grouped);
    });
}

template <class T>
void turn_back(const Turning & how, int64_t first, int64_t last, const T * dy, const float * cosine, const float * sine,
               T * dx) {
    each_head(how, first, last, [&](int64_t in_row, int64_t grouped, int64_t angles) {
        turn_head(how, dy + grouped, cosine + angles, sine + angles, -1.0f, dx + in_row);
    });
}

// `f` is called with where each row begins, and the keys [from, to) that it sees.
template <class F> void each_row(const Scores & of, int64_t first, int64_t last, F f) {
    for (int64_t row = first; row < last; ++row) {
        const int64_t to = of.past + row % of.rows / of.share + 1;
        const int64_t from = of.window > 0 && to > of.window ? to - of.window : 0;
        f(row * of.keys, from, to);
    }
}

template <class T> void softmax(const Scores & of, int64_t first, int64_t last, T * scores) {
    each_row(of, first, last, [&](int64_t begin, int64_t from, int64_t to) {
        T * x = scores + begin;
        float most = -INFINITY;
#pragma omp simd reduction(max : most)
        for (int64_t k = from; k < to; ++k) {
            const float score = load(x[k]) * of.scale;
            most = score > most ? score : most;
        }
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = from; k < to; ++k) sum += exponential(load(x[k]) * of.scale - most);
        const float share = 1.0f / sum;
        for (int64_t k = from; k < to; ++k) store(x[k], exponential(load(x[k]) * of.scale - most) * share);
        std::memset(x, 0, static_cast<size_t>(from) * sizeof(T));
        std::memset(x + to, 0, static_cast<size_t>(of.keys - to) * sizeof(T));
    });
}

template <class T> void softmax_back(const Scores & of, int64_t first, int64_t last, const T * weights, T * gradient) {
    each_row(of, first, last, [&](int64_t begin, int64_t from, int64_t to) {
        const T * w = weights + begin;
        T * g = gradient + begin;
        float mean = 0;
#pragma omp simd reduction(+ : mean)
        for (int64_t k = from; k < to; ++k) mean += load(w[k]) * load(g[k]);
        for (int64_t k = from; k < to; ++k) store(g[k], (load(g[k]) - mean) * load(w[k]) * of.scale);
        std::memset(g, 0, static_cast<size_t>(from) * sizeof(T));
        std::memset(g + to, 0, static_cast<size_t>(of.keys - to) * sizeof(T));
    });
}

template <class T>
void losses(int64_t rows, int64_t columns, T * logits, const int64_t * targets, bool gradient, float * losses,
            bool * correct) {
    for (int64_t row = 0; row < rows; ++row, logits += columns) {
        float most = -INFINITY;
#pragma omp simd reduction(max : most)
        for (int64_t c = 0; c < columns; ++c) {
            const float logit = load(logits[c]);
            most = logit > most ? logit : most;
        }
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < columns; ++c) sum += exponential(load(logits[c]) - most);
        const int64_t target = targets[row];
        const float its = load(logits[target]);
        losses[row] = most + std::log(sum) - its;
        int64_t greatest = 0;
        while (greatest < target && load(logits[greatest]) < its) ++greatest;
        correct[row] = its == most && greatest == target;
        if (!gradient) continue;
        const float share = 1.0f / sum;
        const float mine = exponential(its - most) * share;
        for (int64_t c = 0; c < columns; ++c) store(logits[c], exponential(load(logits[c]) - most) * share);
        store(logits[target], mine - 1.0f);
    }
}

template <class T> constexpr edgellm::TrainingKernels<T> training_kernels() {
    return {norm<T>, norm_back<T>, gate<T>, gate_back<T>, turn<T>, turn_back<T>, softmax<T>, softmax_back<T>, losses<T>};
}

}  // namespace
