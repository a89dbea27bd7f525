// Which expert lies in which slot: the policy of the expert pager.
//
// The same policy as edgellm/moe/residency.py, which explains it, and bit for bit the same decisions: float64, only + - * /
// and comparisons, in the same order, and compiled without contraction to fused multiply-add. A visit costs a pass over
// the layer's experts and, if something must be evicted, one over the pool's slots.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace edgellm {

class Residency {
  public:
    // `expert` is to be read into `slot` of its layer's pool, where `evicted_expert` of `evicted_layer` lay until now
    // (both -1: the slot was free).
    struct Load {
        int32_t expert;
        int32_t slot;
        int32_t evicted_layer;
        int32_t evicted_expert;
    };

    // `pools[layer]` is the pool of the layer's experts, `slots[pool]` how many experts it holds. All methods throw
    // std::invalid_argument for what is not there, and for an expert named twice; nothing has changed then.
    Residency(int layers, int experts, std::vector<int32_t> pools, const std::vector<int32_t> & slots);

    // `layer` needs these distinct experts now. Those not resident that get a slot; valid until the next call that
    // returns some. Until the next visit none of the n is evicted.
    const std::vector<Load> & visit(int layer, const int32_t * experts, size_t n);

    // The next visit of `layer` will probably need these, the most probable first: at most `limit` to read now.
    const std::vector<Load> & prefetch(int layer, const int32_t * experts, size_t n, size_t limit);

    // Free slots are filled with these, the first of them first; nothing is evicted, and nothing is said about visits.
    const std::vector<Load> & preload(int layer, const int32_t * experts, size_t n);

    int32_t slot_of(int layer, int expert) const;  // -1: none
    std::vector<int32_t> resident(int layer) const;
    void set_busy(int pool, int slot, bool busy);  // a busy slot is not evicted
    void forget(int layer, int expert);            // its slot, no longer busy, is free again; nothing if it has none

    int layers() const { return layers_; }
    int experts() const { return experts_; }

  private:
    static constexpr int kAverages = 3;
    struct Pool {
        std::vector<int32_t> holds;  // the number (layer * experts + expert) of the expert in each slot, or -1
        std::vector<double> due;     // its due time; below all others if the slot is free
        std::vector<uint8_t> busy;
        std::vector<int32_t> free;   // the last is taken first
    };
    struct Candidate {
        double due;
        int32_t slot;
    };

    void check(int layer, const int32_t * experts, size_t n);
    void advance(int layer);
    void learn(int layer, const int32_t * experts, size_t n);
    void judge_prediction(int layer, size_t n);
    void judge_repeats(int layer, size_t n);
    void estimate(int layer);
    double probability(size_t number, double floor) const;
    void collect_missing(int layer, const int32_t * experts, size_t n, size_t limit);
    void find_victims(const Pool & pool, size_t count);
    void fill(Pool & pool, int32_t slot, int32_t number);

    int layers_, experts_;
    std::vector<int32_t> pool_of_;
    std::vector<Pool> pools_;
    std::vector<double> averages_[kAverages];  // (layers * experts), as due_ and slot_
    std::vector<double> due_;
    std::vector<int32_t> slot_;
    std::vector<double> share_;
    std::vector<int64_t> visits_, next_;
    std::vector<uint8_t> has_prediction_;
    std::vector<std::vector<int32_t>> predicted_, last_;
    int64_t now_ = -1;
    int64_t calls_ = 0;             // marks of check(): an expert is in this call's list if marks_[expert] == calls_
    std::vector<int64_t> marks_;    // (experts)
    std::vector<uint8_t> pinned_;   // (layers * experts)
    std::vector<int32_t> pinned_list_;
    double expected_, repeated_, promised_, kept_, others_, missed_;
    std::vector<double> chances_;   // (experts) scratch
    std::vector<Load> loads_;
    std::vector<int32_t> missing_;
    std::vector<Candidate> victims_;
};

}  // namespace edgellm
