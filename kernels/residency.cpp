// Which expert lies in which slot. See residency.h, and edgellm/moe/residency.py for what the numbers mean.
#include "residency.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace edgellm {
namespace {

constexpr double kRates[] = {0.6, 0.05, 0.01};
constexpr double kWeights[] = {0.25, 0.35, 0.4};
constexpr double kStartVisits = 1.0;
constexpr double kFloor = 0.02;
constexpr double kLeast = 0.001, kPredictedLeast = 0.05;
constexpr double kPredictedUsed = 80.0, kOthersUsed = 1.0, kPriorExperts = 100.0;
constexpr double kEvidenceLoss = 1.0 / 1024.0, kPriorRepeats = 100.0;
constexpr double kFree = -std::numeric_limits<double>::infinity();

// Which of two is evicted first: the one due later, of equal ones that in the first slot.
template <class T> bool goes_first(const T & a, const T & b) { return a.due != b.due ? a.due > b.due : a.slot < b.slot; }

}  // namespace

Residency::Residency(int layers, int experts, std::vector<int32_t> pools, const std::vector<int32_t> & slots)
    : layers_(layers), experts_(experts), pool_of_(std::move(pools)), expected_(kPriorRepeats), repeated_(kPriorRepeats),
      promised_(kPriorExperts), kept_(kPredictedUsed), others_(kPriorExperts), missed_(kOthersUsed) {
    if (layers < 1 || experts < 1) throw std::invalid_argument("there must be a layer and an expert");
    if (pool_of_.size() != static_cast<size_t>(layers)) throw std::invalid_argument("every layer needs one of the pools");
    std::vector<int64_t> most(slots.size(), 0);
    for (const int32_t pool : pool_of_) {
        if (pool < 0 || static_cast<size_t>(pool) >= slots.size()) throw std::invalid_argument("every layer needs one of the pools");
        most[static_cast<size_t>(pool)] += experts;
    }
    for (size_t i = 0; i < slots.size(); ++i) {
        if (slots[i] < 0 || slots[i] > most[i])
            throw std::invalid_argument("pool " + std::to_string(i) + " cannot have " + std::to_string(slots[i]) +
                                        " slots: 0 to the number of its experts");
        const auto size = static_cast<size_t>(slots[i]);
        Pool pool{std::vector<int32_t>(size, -1), std::vector<double>(size, kFree), std::vector<uint8_t>(size, 0), {}};
        for (int32_t slot = slots[i] - 1; slot >= 0; --slot) pool.free.push_back(slot);
        pools_.push_back(std::move(pool));
    }
    const size_t l = static_cast<size_t>(layers), count = l * static_cast<size_t>(experts);
    for (std::vector<double> & average : averages_) average.assign(count, 0.0);
    due_.assign(count, 0.0);
    slot_.assign(count, -1);
    pinned_.assign(count, 0);
    share_.assign(l, 0.0);
    visits_.assign(l, 0);
    for (int64_t layer = 0; layer < layers; ++layer) next_.push_back(layer);
    has_prediction_.assign(l, 0);
    predicted_.resize(l);
    last_.resize(l);
    chances_.assign(static_cast<size_t>(experts), 0.0);
    marks_.assign(static_cast<size_t>(experts), 0);
}

void Residency::check(int layer, const int32_t * experts, size_t n) {
    if (layer < 0 || layer >= layers_) throw std::invalid_argument("there is no layer " + std::to_string(layer));
    ++calls_;
    for (size_t i = 0; i < n; ++i) {
        if (experts[i] < 0 || experts[i] >= experts_)
            throw std::invalid_argument("experts are numbered from 0 to " + std::to_string(experts_ - 1));
        if (std::exchange(marks_[static_cast<size_t>(experts[i])], calls_) == calls_)
            throw std::invalid_argument("an expert is named twice");
    }
}

const std::vector<Residency::Load> & Residency::visit(int layer, const int32_t * experts, size_t n) {
    check(layer, experts, n);
    advance(layer);
    learn(layer, experts, n);
    for (const int32_t number : pinned_list_) pinned_[static_cast<size_t>(number)] = 0;
    pinned_list_.clear();
    for (size_t i = 0; i < n; ++i) {
        pinned_list_.push_back(layer * experts_ + experts[i]);
        pinned_[static_cast<size_t>(pinned_list_.back())] = 1;
    }
    Pool & pool = pools_[static_cast<size_t>(pool_of_[static_cast<size_t>(layer)])];
    collect_missing(layer, experts, n, n);
    loads_.clear();
    find_victims(pool, missing_.size() - std::min(missing_.size(), pool.free.size()));
    size_t victim = 0;
    for (const int32_t number : missing_) {
        if (!pool.free.empty()) {
            const int32_t slot = pool.free.back();
            pool.free.pop_back();
            fill(pool, slot, number);
        } else if (victim < victims_.size()) {
            fill(pool, victims_[victim++].slot, number);
        }
    }
    return loads_;
}

const std::vector<Residency::Load> & Residency::prefetch(int layer, const int32_t * experts, size_t n, size_t limit) {
    check(layer, experts, n);
    const auto l = static_cast<size_t>(layer);
    has_prediction_[l] = 1;
    predicted_[l].assign(experts, experts + n);
    estimate(layer);
    Pool & pool = pools_[static_cast<size_t>(pool_of_[l])];
    collect_missing(layer, experts, n, limit);
    loads_.clear();
    find_victims(pool, missing_.size() - std::min(missing_.size(), pool.free.size()));
    size_t victim = 0;
    for (const int32_t number : missing_) {
        if (!pool.free.empty()) {
            const int32_t slot = pool.free.back();
            pool.free.pop_back();
            fill(pool, slot, number);
        } else {
            if (victim == victims_.size() || !(victims_[victim].due > due_[static_cast<size_t>(number)])) break;
            fill(pool, victims_[victim++].slot, number);
        }
    }
    return loads_;
}

const std::vector<Residency::Load> & Residency::preload(int layer, const int32_t * experts, size_t n) {
    check(layer, experts, n);
    Pool & pool = pools_[static_cast<size_t>(pool_of_[static_cast<size_t>(layer)])];
    collect_missing(layer, experts, n, pool.free.size());
    loads_.clear();
    for (const int32_t number : missing_) {
        const int32_t slot = pool.free.back();
        pool.free.pop_back();
        fill(pool, slot, number);
    }
    return loads_;
}

int32_t Residency::slot_of(int layer, int expert) const {
    if (layer < 0 || layer >= layers_) throw std::invalid_argument("there is no layer " + std::to_string(layer));
    if (expert < 0 || expert >= experts_)
        throw std::invalid_argument("experts are numbered from 0 to " + std::to_string(experts_ - 1));
    return slot_[static_cast<size_t>(layer) * static_cast<size_t>(experts_) + static_cast<size_t>(expert)];
}

std::vector<int32_t> Residency::resident(int layer) const {
    std::vector<int32_t> found;
    for (int32_t expert = 0; expert < experts_; ++expert)
        if (slot_of(layer, expert) >= 0) found.push_back(expert);
    return found;
}

void Residency::set_busy(int pool, int slot, bool busy) {
    if (pool < 0 || static_cast<size_t>(pool) >= pools_.size() || slot < 0 ||
        static_cast<size_t>(slot) >= pools_[static_cast<size_t>(pool)].busy.size())
        throw std::invalid_argument("there is no slot " + std::to_string(slot) + " in pool " + std::to_string(pool));
    pools_[static_cast<size_t>(pool)].busy[static_cast<size_t>(slot)] = busy;
}

void Residency::forget(int layer, int expert) {
    const int32_t found = slot_of(layer, expert);
    if (found < 0) return;
    Pool & pool = pools_[static_cast<size_t>(pool_of_[static_cast<size_t>(layer)])];
    const auto slot = static_cast<size_t>(found);
    slot_[static_cast<size_t>(pool.holds[slot])] = -1;
    pool.holds[slot] = -1;
    pool.due[slot] = kFree;
    pool.busy[slot] = 0;
    pool.free.push_back(found);
}

// Moves the clock to the visit of `layer`; layers left out on the way are expected a cycle later.
void Residency::advance(int layer) {
    for (++now_; now_ % layers_ != layer; ++now_) {
        const auto skipped = static_cast<int>(now_ % layers_);
        next_[static_cast<size_t>(skipped)] += layers_;
        has_prediction_[static_cast<size_t>(skipped)] = 0;
        estimate(skipped);
    }
    next_[static_cast<size_t>(layer)] = now_ + layers_;
}

// Takes one visit's uses, the marks of check(), into the averages, and estimates the layer's experts anew.
void Residency::learn(int layer, const int32_t * experts, size_t n) {
    judge_prediction(layer, n);
    judge_repeats(layer, n);
    const auto l = static_cast<size_t>(layer);
    last_[l].assign(experts, experts + n);
    const double mean = 1.0 / (static_cast<double>(++visits_[l]) + kStartVisits);
    const size_t first = l * static_cast<size_t>(experts_);
    for (int i = 0; i < kAverages; ++i) {
        const double step = std::max(kRates[i], mean);
        double * average = averages_[i].data() + first;
        for (int32_t e = 0; e < experts_; ++e) {
            const double used = marks_[static_cast<size_t>(e)] == calls_ ? 1.0 : 0.0;
            average[e] = average[e] + step * (used - average[e]);
        }
    }
    const double step = std::max(kRates[2], mean);
    share_[l] += step * (static_cast<double>(n) / experts_ - share_[l]);
    has_prediction_[l] = 0;
    estimate(layer);
}

// Compares what was predicted for this visit with what it used: the marks of check().
void Residency::judge_prediction(int layer, size_t n) {
    const auto l = static_cast<size_t>(layer);
    if (!has_prediction_[l]) return;
    const std::vector<int32_t> & predicted = predicted_[l];
    double right = 0;
    for (const int32_t expert : predicted) right += marks_[static_cast<size_t>(expert)] == calls_;
    const double count = static_cast<double>(predicted.size());
    promised_ += kEvidenceLoss * (kPriorExperts - promised_) + count;
    kept_ += kEvidenceLoss * (kPredictedUsed - kept_) + right;
    others_ += kEvidenceLoss * (kPriorExperts - others_) + (experts_ - count);
    missed_ += kEvidenceLoss * (kOthersUsed - missed_) + (static_cast<double>(n) - right);
}

// Compares how many experts of the layer's last visit were to be used again with how many are.
void Residency::judge_repeats(int layer, size_t n) {
    const auto l = static_cast<size_t>(layer);
    const std::vector<int32_t> & last = last_[l];
    if (!(n <= 2 * last.size() && last.size() <= 2 * n)) return;
    const size_t first = l * static_cast<size_t>(experts_);
    double expected = 0, repeated = 0;
    for (const int32_t expert : last) {
        expected += probability(first + static_cast<size_t>(expert), kFloor * share_[l]);
        repeated += marks_[static_cast<size_t>(expert)] == calls_;
    }
    expected_ += kEvidenceLoss * (kPriorRepeats - expected_) + expected;
    repeated_ += kEvidenceLoss * (kPriorRepeats - repeated_) + repeated;
}

double Residency::probability(size_t number, double floor) const {
    const double p = kWeights[0] * averages_[0][number] + kWeights[1] * averages_[1][number] +
                     kWeights[2] * averages_[2][number] + floor;
    return std::min(p, 1.0);
}

void Residency::estimate(int layer) {
    const auto l = static_cast<size_t>(layer), experts = static_cast<size_t>(experts_);
    const size_t first = l * experts;
    const double floor = kFloor * share_[l], coming = static_cast<double>(next_[l]), cycle = layers_;
    const double correction = repeated_ / expected_, unlikely = missed_ / others_, likely = kept_ / promised_;
    const bool predicted = has_prediction_[l];
    for (size_t e = 0; e < experts; ++e) chances_[e] = probability(first + e, floor);
    for (const int32_t expert : last_[l]) {
        double & p = chances_[static_cast<size_t>(expert)];
        p = std::min(p * correction, 1.0);
    }
    for (size_t e = 0; e < experts; ++e) {
        const double p = chances_[e];
        due_[first + e] = coming + (1.0 - (predicted ? unlikely : p)) / std::max(p, kLeast) * cycle;
    }
    if (predicted)
        for (const int32_t expert : predicted_[l]) {
            const auto e = static_cast<size_t>(expert);
            due_[first + e] = coming + (1.0 - likely) / std::max(chances_[e], kPredictedLeast) * cycle;
        }
    Pool & pool = pools_[static_cast<size_t>(pool_of_[l])];
    for (size_t number = first; number < first + experts; ++number)
        if (slot_[number] >= 0) pool.due[static_cast<size_t>(slot_[number])] = due_[number];
}

// The numbers of the first `limit` experts that have no slot, into missing_.
void Residency::collect_missing(int layer, const int32_t * experts, size_t n, size_t limit) {
    missing_.clear();
    for (size_t i = 0; i < n && missing_.size() < limit; ++i) {
        const int32_t number = layer * experts_ + experts[i];
        if (slot_[static_cast<size_t>(number)] < 0) missing_.push_back(number);
    }
}

// At most `count` slots whose experts may be evicted, in the order in which they go, into victims_.
void Residency::find_victims(const Pool & pool, size_t count) {
    victims_.clear();
    if (count == 0) return;
    const auto better = goes_first<Candidate>;  // a heap by it has the last to go at the front
    double least = kFree;
    for (size_t slot = 0; slot < pool.holds.size(); ++slot) {
        if (!(pool.due[slot] > least) || pool.busy[slot] || pinned_[static_cast<size_t>(pool.holds[slot])]) continue;
        if (victims_.size() == count) {
            std::pop_heap(victims_.begin(), victims_.end(), better);
            victims_.pop_back();
        }
        victims_.push_back({pool.due[slot], static_cast<int32_t>(slot)});
        std::push_heap(victims_.begin(), victims_.end(), better);
        if (victims_.size() == count) least = victims_.front().due;
    }
    std::sort_heap(victims_.begin(), victims_.end(), better);
}

void Residency::fill(Pool & pool, int32_t slot, int32_t number) {
    const auto s = static_cast<size_t>(slot);
    const int32_t old = pool.holds[s];
    if (old >= 0) slot_[static_cast<size_t>(old)] = -1;
    pool.holds[s] = number;
    pool.due[s] = due_[static_cast<size_t>(number)];
    slot_[static_cast<size_t>(number)] = slot;
    loads_.push_back({number % experts_, slot, old >= 0 ? old / experts_ : -1, old >= 0 ? old % experts_ : -1});
}

}  // namespace edgellm
