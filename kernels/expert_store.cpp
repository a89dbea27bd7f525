#include "expert_store.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <system_error>

#include <sys/mman.h>

#include "narrow.h"

namespace edgellm {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kMostAhead = 64;  // matrices that wait to be read ahead
// What was read ahead for a rank: from so many on, this part must have been used; old ones count half after so many; a
// rank that is not worth it is tried again once in so many times.
constexpr int32_t kRecordStart = 32, kWorthPercent = 60, kRecordEnd = 512, kRetry = 32;

// Address space in huge pages where there are any; it takes memory when it is written to.
uint8_t * reserve(size_t size) {
    void * p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "no address space for experts");
#ifdef MADV_HUGEPAGE
    madvise(p, size, MADV_HUGEPAGE);
#endif
    return static_cast<uint8_t *>(p);
}

void check_experts(const ExpertSlice & slice, int experts) {
    for (const size_t size : {slice.offsets.size(), slice.widths.size()})
        if (size != 0 && size != static_cast<size_t>(experts)) throw std::invalid_argument(slice.name + " has another number of experts");
    for (const uint8_t width : slice.widths)
        if (width != 0 && !can_narrow(slice.type, width)) throw std::invalid_argument(slice.name + " cannot have been narrowed so");
}

}  // namespace

ExpertStore::ExpertStore(ExpertStoreParams params) : params_(std::move(params)) {
    lay_out();
    try {
        files_ = std::make_unique<ExpertFiles>(params_.files, params_.direct);
        for (const ExpertSlice & slice : params_.slices)
            for (int32_t e = 0; e < params_.experts; ++e)
                if (slice.offset_of(e) + slice.stored_bytes(e) > files_->bytes(slice.file))
                    throw std::invalid_argument(slice.name + " reaches beyond the end of its file");
        reader_bytes_ = reader_bytes(params_.slices, params_.experts);
        for (Pool & pool : pools_) {
            pool.mapped_bytes = rounded(std::max<size_t>(pool.slot_bytes * static_cast<size_t>(pool.slots), 1), kHugePage);
            pool.base = reserve(pool.mapped_bytes);
        }
        stream_mapped_ = rounded(params_.stream_bytes, kHugePage);
        stream_ = reserve(stream_mapped_);
        residency_ = std::make_unique<Residency>(params_.layers, params_.experts, params_.pools, params_.slots);
        if (std::accumulate(params_.slots.begin(), params_.slots.end(), int64_t{0}) < int64_t{params_.layers} * params_.experts)
            table_ = std::make_unique<PairTable>(params_.layers, params_.experts);
        for (int i = 0; i < params_.readers; ++i) readers_.emplace_back(&ExpertStore::work, this);
    } catch (...) {
        close_all();
        throw;
    }
}

ExpertStore::~ExpertStore() { close_all(); }

void ExpertStore::lay_out() {
    layers_.resize(static_cast<size_t>(params_.layers));
    claimed_.assign(layers_.size(), 0);
    counts_.assign(layers_.size() * static_cast<size_t>(params_.experts), 0);
    pools_.resize(params_.slots.size());
    size_t largest = 0;
    for (ExpertSlice & slice : params_.slices) {
        if (slice.layer < 0 || slice.layer >= params_.layers) throw std::invalid_argument("a slice of no layer");
        auto & layer = layers_[static_cast<size_t>(slice.layer)];
        slice.index = static_cast<int>(layer.size());
        slice.extent = slice_extent(slice);
        slice.start = layer.empty() ? 0 : layer.back()->start + layer.back()->extent;
        layer.push_back(&slice);
        names_[slice.name] = &slice;
        largest = std::max(largest, slice.extent);
        if (slice.file < 0 || static_cast<size_t>(slice.file) >= params_.files.size()) throw std::invalid_argument("a slice of no file");
        check_experts(slice, params_.experts);
    }
    for (size_t l = 0; l < layers_.size(); ++l) {
        if (layers_[l].empty() || layers_[l].size() > 32) throw std::invalid_argument("a layer has between 1 and 32 slices");
        Pool & pool = pools_.at(static_cast<size_t>(params_.pools.at(l)));
        const ExpertSlice & last = *layers_[l].back();
        pool.slot_bytes = std::max(pool.slot_bytes, last.start + last.extent);
        pool.parts = std::max(pool.parts, static_cast<int>(layers_[l].size()));
    }
    if (!params_.checksums.empty() && params_.checksums.size() != params_.slices.size() * static_cast<size_t>(params_.experts))
        throw std::invalid_argument("there is one checksum for each matrix");
    if (!params_.trial_widths.empty() && params_.trial_widths.size() != counts_.size())
        throw std::invalid_argument("there is one trial width for each expert");
    if (params_.stream_bytes < 2 * largest) throw std::invalid_argument("the streaming area holds less than two matrices");
    for (size_t p = 0; p < pools_.size(); ++p) {
        Pool & pool = pools_[p];
        pool.slots = params_.slots[p];
        const size_t states = static_cast<size_t>(pool.slots) * static_cast<size_t>(pool.parts);
        pool.states = std::make_unique<std::atomic<State>[]>(states);
        for (size_t i = 0; i < states; ++i) pool.states[i].store(State::absent, std::memory_order_relaxed);
        pool.content.resize(static_cast<size_t>(pool.slots));
    }
    size_t smallest = largest;
    for (const ExpertSlice & slice : params_.slices) smallest = std::min(smallest, slice.extent);
    cells_ = std::make_unique<std::atomic<State>[]>(params_.stream_bytes / std::max<size_t>(smallest, 1));
}

void ExpertStore::close_all() noexcept {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    work_.notify_all();
    for (std::thread & reader : readers_) reader.join();
    readers_.clear();
    for (Pool & pool : pools_)
        if (pool.base != nullptr) munmap(pool.base, pool.mapped_bytes);
    if (stream_ != nullptr) munmap(stream_, stream_mapped_);
}

const ExpertSlice * ExpertStore::slice(const std::string & name) const {
    const auto found = names_.find(name);
    return found == names_.end() ? nullptr : found->second;
}

// --- the running multiplication

void ExpertStore::begin(const ExpertSlice & slice, const int32_t * experts, size_t n) {
    std::lock_guard<std::mutex> lock(mutex_);
    current_ = &slice;
    tasks_.clear();
    streamed_.clear();
    streamed_at_ = requested_ = 0;
    fresh_ = false;
    if (failed()) return;
    const uint32_t bit = uint32_t{1} << slice.index;
    if (slice.layer != layer_ || (seen_ & bit) != 0) start_visit(slice, experts, n);
    seen_ |= bit;
    for (size_t i = 0; i < n; ++i) {
        const int slot = residency_->slot_of(slice.layer, experts[i]);
        if (slot < 0) {
            streamed_.push_back(experts[i]);
            continue;
        }
        const Job job{&slice, experts[i], slot, Urgency::now};
        const State now = state(job).load(std::memory_order_relaxed);
        if (now == State::queued) {
            promote(slice, experts[i], slot);
        } else if (now == State::absent) {
            request(slice, experts[i], slot, Urgency::now);
        } else if (now == State::failed) {  // ahead of the step, which needs it
            error_ = ahead_error_;
            failed_.store(true, std::memory_order_release);
            return;
        }
        tasks_.push_back({experts[i], address(job), &state(job)});
    }
    std::stable_partition(tasks_.begin(), tasks_.end(),
                          [](const Task & t) { return t.state->load(std::memory_order_relaxed) == State::ready; });
    if (!streamed_.empty()) {
        stats_.streamed += fresh_ ? streamed_.size() : 0;
        half_ = std::max<size_t>(2, params_.stream_bytes / slice.extent) / 2;
        stream_half();
        stream_half();
    }
    if (!queue(Urgency::now).empty()) work_.notify_all();  // waking readers for nothing cost a tenth of a step
}

bool ExpertStore::next() {
    if (!more()) return false;
    std::lock_guard<std::mutex> lock(mutex_);
    tasks_.clear();
    if (failed()) {  // nobody has waited for the last wave: its cells may still be written to
        streamed_at_ = streamed_.size();
        return true;
    }
    if (streamed_at_ >= half_) stream_half();  // into the half that the last wave has left
    const size_t end = std::min(streamed_at_ + half_, streamed_.size());
    for (; streamed_at_ < end; ++streamed_at_) {
        const size_t cell = streamed_at_ % (2 * half_);
        const Job job{current_, streamed_[streamed_at_], ~static_cast<int32_t>(cell), Urgency::now};
        tasks_.push_back({job.expert, address(job), &state(job)});
    }
    if (!queue(Urgency::now).empty()) work_.notify_all();
    return true;
}

// Requests the matrices of the next half of the streaming area.
void ExpertStore::stream_half() {
    const size_t end = std::min(requested_ + half_, streamed_.size());
    for (; requested_ < end; ++requested_) {
        const Job job{current_, streamed_[requested_], ~static_cast<int32_t>(requested_ % (2 * half_)), Urgency::now};
        state(job).store(State::queued, std::memory_order_relaxed);
        queue(Urgency::now).push_back(job);
    }
}

void ExpertStore::start_visit(const ExpertSlice & slice, const int32_t * experts, size_t n) {
    layer_ = slice.layer;
    seen_ = 0;
    fresh_ = true;
    const auto layer = static_cast<size_t>(layer_);
    const int pool = params_.pools[layer];
    drop_stale(layer_, experts, n);
    stats_.visits += 1;
    stats_.needed += n;
    for (size_t i = 0; i < n; ++i) ++counts_[layer * static_cast<size_t>(params_.experts) + static_cast<size_t>(experts[i])];
    const std::vector<Residency::Load> & loads = residency_->visit(layer_, experts, n);
    for (const Residency::Load & load : loads) occupy(pool, load, layer_, false);
    for (size_t i = 0; i < n; ++i) {
        const int slot = residency_->slot_of(layer_, experts[i]);
        if (slot < 0) continue;
        Pool::Slot & content = pools_[static_cast<size_t>(pool)].content[static_cast<size_t>(slot)];
        content.wanted = true;  // whatever is still to be read of it: if that fails, the slot must not be another's
        if (content.prefetched) {
            content.prefetched = false;
            ++(content.counted ? stats_.prefetch_used : stats_.loads);
            judge(content, true);
        } else {
            ++stats_.hits;
        }
    }
    stats_.hits -= loads.size();
    stats_.loads += loads.size();
    // The matrices of this multiplication first, of all the experts; then those of the ones that follow.
    for (const Residency::Load & load : loads) request(slice, load.expert, load.slot, Urgency::now);
    for (const ExpertSlice * other : layers_[layer])
        if (other != &slice)
            for (const Residency::Load & load : loads) request(*other, load.expert, load.slot, Urgency::now);
}

void ExpertStore::prefetch(int layer, const int32_t * experts, size_t n, int limit, const int32_t * ranks) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (failed()) return;
    const int pool = params_.pools[static_cast<size_t>(layer)];
    worth_.clear();
    for (size_t i = 0; i < n; ++i)
        if (ranks == nullptr || residency_->slot_of(layer, experts[i]) >= 0 || worth_reading(ranks[i])) worth_.push_back(experts[i]);
    const std::vector<Residency::Load> loads = residency_->prefetch(layer, worth_.data(), worth_.size(), static_cast<size_t>(limit));
    if (worth_.size() < n) residency_->prefetch(layer, experts, n, 0);  // all of them are foreseen, nevertheless
    for (const Residency::Load & load : loads) {
        occupy(pool, load, layer, true);
        if (ranks != nullptr) {
            const auto rank = ranks[std::find(experts, experts + n, load.expert) - experts];
            pools_[static_cast<size_t>(pool)].content[static_cast<size_t>(load.slot)].rank = static_cast<int16_t>(rank);
        }
        for (const ExpertSlice * slice : layers_[static_cast<size_t>(layer)]) request(*slice, load.expert, load.slot, Urgency::ahead);
    }
    if (!loads.empty()) work_.notify_all();
}

void ExpertStore::preload(int layer, const int32_t * experts, size_t n) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (failed()) return;
    const int pool = params_.pools[static_cast<size_t>(layer)];
    const std::vector<Residency::Load> & loads = residency_->preload(layer, experts, n);
    for (const Residency::Load & load : loads) {
        occupy(pool, load, layer, false);
        for (const ExpertSlice * slice : layers_[static_cast<size_t>(layer)]) request(*slice, load.expert, load.slot, Urgency::idle);
    }
    if (!loads.empty()) work_.notify_all();
}

bool ExpertStore::idle() {
    std::lock_guard<std::mutex> lock(mutex_);
    return queue(Urgency::ahead).size() < kMostAhead;
}

void ExpertStore::set_route(std::vector<int32_t> route, std::vector<int32_t> foreseen) {
    const auto out_of_range = [&](int32_t e) { return e < 0 || e >= params_.experts; };
    if (std::any_of(route.begin(), route.end(), out_of_range) || std::any_of(foreseen.begin(), foreseen.end(), out_of_range))
        throw std::invalid_argument("no such expert");
    route_ = std::move(route);
    foreseen_ = std::move(foreseen);
}

void ExpertStore::log(int distance, int layer, int token, const int32_t * experts, int n) {
    log_.insert(log_.end(), {distance, layer, token, n});
    log_.insert(log_.end(), experts, experts + n);
}

// The first expert that a router names is nearly always right, the last often not, and those that are not in memory are
// the more doubtful ones: so it is the record of each rank that decides.
bool ExpertStore::worth_reading(int32_t rank) {
    if (static_cast<size_t>(rank) >= records_.size()) records_.resize(static_cast<size_t>(rank) + 1);
    Record & record = records_[static_cast<size_t>(rank)];
    const int32_t total = record.used + record.wasted;
    if (total < kRecordStart || record.used * 100 >= total * kWorthPercent) return true;
    return ++record.skipped % kRetry == 0;
}

void ExpertStore::judge(const Pool::Slot & content, bool used) {
    if (content.rank < 0) return;
    Record & record = records_[static_cast<size_t>(content.rank)];
    ++(used ? record.used : record.wasted);
    if (record.used + record.wasted >= kRecordEnd) {
        record.used /= 2;
        record.wasted /= 2;
    }
}

// The layer's turn has come: what was to be read ahead for it, is not needed, and has not begun, is not read.
void ExpertStore::drop_stale(int layer, const int32_t * experts, size_t n) {
    std::deque<Job> & ahead = queue(Urgency::ahead);
    if (ahead.empty()) return;
    const int pool = params_.pools[static_cast<size_t>(layer)];
    Pool & p = pools_[static_cast<size_t>(pool)];
    const auto parts = static_cast<int>(layers_[static_cast<size_t>(layer)].size());
    const auto stale = [&](const Job & job) {
        return job.slice->layer == layer && std::find(experts, experts + n, job.expert) == experts + n &&
               p.content[static_cast<size_t>(job.place)].pending == parts && !p.content[static_cast<size_t>(job.place)].counted;
    };
    std::vector<Job> dropped;
    for (const Job & job : ahead)
        if (job.slice->index == 0 && stale(job)) dropped.push_back(job);
    for (const Job & job : dropped) {
        ahead.erase(std::remove_if(ahead.begin(), ahead.end(),
                                   [&](const Job & other) { return other.slice->layer == layer && other.expert == job.expert; }),
                    ahead.end());
        for (const ExpertSlice * slice : layers_[static_cast<size_t>(layer)])
            slot_state(*slice, job.place).store(State::absent, std::memory_order_relaxed);
        p.content[static_cast<size_t>(job.place)] = {};
        residency_->set_busy(pool, job.place, false);
        residency_->forget(layer, job.expert);
    }
}

void ExpertStore::occupy(int pool, const Residency::Load & load, int layer, bool prefetched) {
    Pool & p = pools_[static_cast<size_t>(pool)];
    Pool::Slot & content = p.content[static_cast<size_t>(load.slot)];
    if (content.prefetched && content.counted) {
        ++stats_.prefetch_wasted;
        judge(content, false);
    }
    content = {};
    content.layer = layer;
    content.expert = load.expert;
    content.prefetched = prefetched;
    for (int part = 0; part < p.parts; ++part)
        p.states[static_cast<size_t>(load.slot * p.parts + part)].store(State::absent, std::memory_order_relaxed);
}

void ExpertStore::request(const ExpertSlice & slice, int32_t expert, int slot, Urgency urgency) {
    const int pool = params_.pools[static_cast<size_t>(slice.layer)];
    Pool::Slot & content = pools_[static_cast<size_t>(pool)].content[static_cast<size_t>(slot)];
    if (content.pending++ == 0) residency_->set_busy(pool, slot, true);
    slot_state(slice, slot).store(State::queued, std::memory_order_relaxed);
    queue(urgency).push_back({&slice, expert, slot, urgency});
}

// What was to be read ahead, or some time, is needed now.
void ExpertStore::promote(const ExpertSlice & slice, int32_t expert, int slot) {
    const auto wanted = [&](const Job & job) { return job.slice == &slice && job.expert == expert && job.place == slot; };
    for (const Urgency urgency : {Urgency::ahead, Urgency::idle}) {
        std::deque<Job> & jobs = queue(urgency);
        const auto found = std::find_if(jobs.begin(), jobs.end(), wanted);
        if (found == jobs.end()) continue;
        jobs.erase(found);
        queue(Urgency::now).push_back({&slice, expert, slot, Urgency::now});
        return;
    }
}

ExpertStats ExpertStore::stats() {
    std::lock_guard<std::mutex> lock(mutex_);
    return stats_;
}

uint64_t ExpertStore::reads() {
    std::lock_guard<std::mutex> lock(mutex_);
    return stats_.reads;
}

std::vector<uint32_t> ExpertStore::counts() {
    std::lock_guard<std::mutex> lock(mutex_);
    return counts_;
}

size_t ExpertStore::resident_bytes() {
    std::lock_guard<std::mutex> lock(mutex_);
    size_t total = 0;
    for (const Pool & pool : pools_)
        for (const Pool::Slot & slot : pool.content) total += slot.layer >= 0 ? pool.slot_bytes : 0;
    return total;
}

}  // namespace edgellm
