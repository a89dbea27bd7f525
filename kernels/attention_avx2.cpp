// Attention of a few rows on AVX2 with FMA and F16C.
#include "attention.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace {

using edgellm::Attention;
using edgellm::kBlockCells;
using edgellm::kPartCells;

constexpr int kLanes = 8;
constexpr int kVectors = static_cast<int>(kBlockCells) / kLanes;  // of a block's scores
constexpr float kNone = -std::numeric_limits<float>::infinity();

inline __m256 halves(const void * p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i *>(p))); }

inline float sum_of(__m256 x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float most_of(__m256 x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// exp of numbers up to 0, relative error 2e-7; minus infinity gives 0, and so does whatever is below -87.
inline __m256 exponential(__m256 x) {
    const __m256 least = _mm256_set1_ps(-87.0f);
    const __m256 seen = _mm256_cmp_ps(x, least, _CMP_GE_OQ);
    x = _mm256_max_ps(x, least);
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    // Taylor's series; |r| <= ln(2) / 2.
    __m256 p = _mm256_set1_ps(1.0f / 5040);
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(power)), seen);
}

inline float exponential(float x) { return _mm256_cvtss_f32(exponential(_mm256_set1_ps(x))); }

// Some cells' keys or values as floats, (cells, width); zeros for what the block lacks.
void expand(const char * from, size_t stride, const int32_t * cells, int64_t count, int64_t width, float * to) {
    for (int64_t c = 0; c < count; ++c, to += width) {
        const char * cell = from + static_cast<size_t>(cells[c]) * stride;
        for (int64_t d = 0; d < width; d += kLanes) _mm256_storeu_ps(to + d, halves(cell + d * 2));
    }
    std::fill_n(to, (kBlockCells - count) * width, 0.0f);
}

// The products of one query with four keys of a block.
inline __m128 four_products(const float * query, const float * keys, int64_t width) {
    __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;
    for (int64_t i = 0; i < width; i += kLanes) {
        const __m256 q = _mm256_loadu_ps(query + i);
        a = _mm256_fmadd_ps(q, _mm256_loadu_ps(keys + i), a);
        b = _mm256_fmadd_ps(q, _mm256_loadu_ps(keys + width + i), b);
        c = _mm256_fmadd_ps(q, _mm256_loadu_ps(keys + 2 * width + i), c);
        d = _mm256_fmadd_ps(q, _mm256_loadu_ps(keys + 3 * width + i), d);
    }
    const __m256 both = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
}

// sums[0..n) of 8 floats each: times `fade`, and plus the weighted values.
template <int N> void add_values(const float * weights, const float * values, int64_t width, float fade, float * sums) {
    __m256 total[N];
    for (int n = 0; n < N; ++n) total[n] = _mm256_mul_ps(_mm256_loadu_ps(sums + n * kLanes), _mm256_set1_ps(fade));
    for (int64_t c = 0; c < kBlockCells; ++c) {
        if (weights[c] == 0.0f) continue;  // hidden cells may hold anything, also what is no number
        const __m256 weight = _mm256_set1_ps(weights[c]);
        for (int n = 0; n < N; ++n) total[n] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(values + c * width + n * kLanes), total[n]);
    }
    for (int n = 0; n < N; ++n) _mm256_storeu_ps(sums + n * kLanes, total[n]);
}

void add_values(const float * weights, const float * values, int64_t width, float fade, float * sums) {
    int64_t d = 0;
    for (; d + 8 * kLanes <= width; d += 8 * kLanes) add_values<8>(weights, values + d, width, fade, sums + d);
    for (; d < width; d += kLanes) add_values<1>(weights, values + d, width, fade, sums + d);
}

// The scores of one query with a block of keys; the highest of them. `added` is minus infinity where there is no cell.
float score(const float * query, const float * keys, int64_t width, const float * added, float scale, float * scores) {
    for (int64_t c = 0; c < kBlockCells; c += 4) _mm_storeu_ps(scores + c, four_products(query, keys + c * width, width));
    __m256 most = _mm256_set1_ps(kNone);
    for (int v = 0; v < kVectors; ++v) {
        const __m256 bias = _mm256_loadu_ps(added + v * kLanes), none = _mm256_set1_ps(kNone);
        __m256 s = _mm256_fmadd_ps(_mm256_loadu_ps(scores + v * kLanes), _mm256_set1_ps(scale), bias);
        s = _mm256_blendv_ps(s, none, _mm256_cmp_ps(bias, none, _CMP_EQ_OQ));
        _mm256_storeu_ps(scores + v * kLanes, s);
        most = _mm256_max_ps(most, s);
    }
    return most_of(most);
}

float value_of(const char * half) {
    uint16_t bits;
    std::memcpy(&bits, half, sizeof bits);
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
}

void look(const Attention & of, int64_t first, int64_t last) {
    const __m256i hidden = _mm256_set1_epi16(static_cast<int16_t>(0xFC00));  // minus infinity
    for (int64_t row = first; row < last; ++row) {
        const char * mask = of.mask + static_cast<size_t>(row) * of.mask_row;
        int32_t * seen = of.seen + row * (of.cells + 1);
        int32_t count = 0;
        for (int64_t c = 0; c < of.cells; c += 16) {
            const __m256i m = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(mask + c * 2));
            const auto bits = static_cast<uint32_t>(~_mm256_movemask_epi8(_mm256_cmpeq_epi16(m, hidden)));
            for (uint32_t left = bits & 0x55555555u; left != 0; left &= left - 1)
                seen[1 + count++] = static_cast<int32_t>(c) + __builtin_ctz(left) / 2;
        }
        seen[0] = count;
    }
}

// One query's state takes in a block: {highest score, sum of weights, weighted sum of the values}.
void take_block(const float * query, const float * keys, const float * values, const Attention & of, const float * added, float * state) {
    alignas(32) float scores[kBlockCells];
    const float most = std::max(state[0], score(query, keys, of.key_width, added, of.scale, scores));
    if (most == kNone) return;
    const float fade = exponential(state[0] - most);
    __m256 sum = _mm256_setzero_ps();
    for (int v = 0; v < kVectors; ++v) {
        const __m256 weight = exponential(_mm256_sub_ps(_mm256_load_ps(scores + v * kLanes), _mm256_set1_ps(most)));
        _mm256_store_ps(scores + v * kLanes, weight);
        sum = _mm256_add_ps(sum, weight);
    }
    state[0] = most;
    state[1] = state[1] * fade + sum_of(sum);
    add_values(scores, values, of.value_width, fade, state + 2);
}

void part(const Attention & of, int64_t kv_head, int64_t number) {
    alignas(32) float keys[kBlockCells * edgellm::kMostWidth], values[kBlockCells * edgellm::kMostWidth];
    const int64_t group = of.heads / of.kv_heads, size = of.value_width + 2;
    float * states = of.parts + number * of.rows * of.heads * size;
    for (int64_t row = 0; row < of.rows; ++row)
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
            float * state = states + (row * of.heads + head) * size;
            state[0] = kNone;
            std::fill_n(state + 1, size - 1, 0.0f);
        }
    for (int64_t first = number * kPartCells; first < (number + 1) * kPartCells; first += kBlockCells) {
        const int32_t * expanded = nullptr;  // the cells that lie in `keys` and `values`
        int64_t there = 0;
        // The last row of a sequence sees all that the rows before it see, and one cell more.
        for (int64_t row = of.rows - 1; row >= 0; --row) {
            const int32_t * seen = of.seen + row * (of.cells + 1);
            const int64_t count = std::min(kBlockCells, seen[0] - first);
            if (count <= 0) continue;
            const int32_t * block = seen + 1 + first;
            if (count > there || std::memcmp(block, expanded, static_cast<size_t>(count) * sizeof *block) != 0) {
                const auto head = static_cast<size_t>(kv_head);
                expand(of.keys + head * of.key_head, of.key_cell, block, count, of.key_width, keys);
                expand(of.values + head * of.value_head, of.value_cell, block, count, of.value_width, values);
                expanded = block;
                there = count;
            }
            alignas(32) float added[kBlockCells];
            const char * mask = of.mask + static_cast<size_t>(row) * of.mask_row;
            if (count == kBlockCells && block[count - 1] - block[0] == count - 1)
                for (int v = 0; v < kVectors; ++v) _mm256_store_ps(added + v * kLanes, halves(mask + (block[0] + v * kLanes) * 2));
            else
                for (int64_t c = 0; c < kBlockCells; ++c)
                    added[c] = c < count ? value_of(mask + static_cast<size_t>(block[c]) * 2) : kNone;
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
                const char * query = of.query + static_cast<size_t>(row) * of.query_row + static_cast<size_t>(head) * of.query_head;
                take_block(reinterpret_cast<const float *>(query), keys, values, of, added, states + (row * of.heads + head) * size);
            }
        }
    }
}

void gather(const Attention & of, int64_t first, int64_t last) {
    const int64_t size = of.value_width + 2, stride = of.rows * of.heads * size, parts = edgellm::part_count(of);
    for (int64_t i = first; i < last; ++i) {
        const float * states = of.parts + i * size;
        float * result = of.result + i * of.value_width;
        float most = kNone, sum = 0.0f;
        for (int64_t p = 0; p < parts; ++p) most = std::max(most, states[p * stride]);
        std::fill_n(result, of.value_width, 0.0f);
        if (most == kNone) continue;
        for (int64_t p = 0; p < parts; ++p) {
            const float * state = states + p * stride;
            const float fade = exponential(state[0] - most);
            if (fade == 0.0f) continue;
            sum += state[1] * fade;
            for (int64_t d = 0; d < of.value_width; ++d) result[d] += state[2 + d] * fade;
        }
        for (int64_t d = 0; d < of.value_width; ++d) result[d] /= sum;
    }
}

}  // namespace

namespace edgellm {

const AttentionKernels kAttentionAvx2 = {look, part, gather};

}  // namespace edgellm
