// The reader threads of the expert store, and the waiting for them. See expert_store.h.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <utility>

#include "crc32c.h"
#include "expert_store.h"
#include "narrow.h"
#include "packed.h"

namespace edgellm {
namespace {

uint64_t now_ns() {
    return static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count());
}

}  // namespace

ReaderBytes reader_bytes(const std::vector<ExpertSlice> & slices, int experts) {
    ReaderBytes most;
    std::map<std::pair<int, int>, std::vector<const ExpertSlice *>> layers;  // of each file
    for (const ExpertSlice & slice : slices) layers[{slice.layer, slice.file}].push_back(&slice);
    for (const auto & [place, pieces] : layers)
        for (int32_t e = 0; e < experts; ++e) {
            Span all;
            bool beside = false;
            for (const ExpertSlice * piece : pieces) {
                const Span own = Span{}.with(*piece, e);
                if (!piece->straight(e)) most.bounce = std::max(most.bounce, own.sector_bytes());
                if (piece->packed && piece->width_of(e) != 0) most.wide = std::max<size_t>(most.wide, piece->bytes);
                for (const ExpertSlice * other : pieces) beside = beside || (other != piece && own.with(*other, e).worth_one_read());
                all = all.with(*piece, e);
            }
            all.end = std::min(all.end, all.begin + kWholeBytes);  // no read of several is longer
            if (beside) most.bounce = std::max(most.bounce, all.sector_bytes());
        }
    return most;
}

// --- waiting

bool ExpertStore::wait(const Task & task, bool counts) {
    State now = task.state->load(std::memory_order_acquire);
    if (now == State::ready) return true;
    const uint64_t started = counts ? now_ns() : 0;
    std::unique_lock<std::mutex> lock(mutex_);
    ++waiting_;
    arrived_.wait(lock, [&] {
        now = task.state->load(std::memory_order_acquire);
        return now == State::ready || now == State::failed || failed();
    });
    --waiting_;
    if (counts) stats_.stall_ns += now_ns() - started;
    return now == State::ready;
}

void ExpertStore::fail(const std::string & message) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (error_.empty()) error_ = message;
        failed_.store(true, std::memory_order_release);
    }
    arrived_.notify_all();
}

std::string ExpertStore::take_error() {
    std::unique_lock<std::mutex> lock(mutex_);
    // Nobody waits for what is still queued, and it would fail for the same reason; what is being read must end first.
    for (std::deque<Job> & jobs : queues_) {
        for (const Job & job : jobs) finish(job, State::absent);
        jobs.clear();
    }
    arrived_.wait(lock, [&] { return reading_ == 0; });
    std::string message;
    message.swap(error_);
    failed_.store(false, std::memory_order_release);
    layer_ = -1;
    return message;
}

// --- reading

bool ExpertStore::any_queued() const {
    return std::any_of(std::begin(queues_), std::end(queues_), [](const std::deque<Job> & jobs) { return !jobs.empty(); });
}

void ExpertStore::work() {
    void * memory = nullptr;
    if (reader_bytes_.bounce != 0 && posix_memalign(&memory, kSector, reader_bytes_.bounce) != 0) memory = nullptr;
    const std::unique_ptr<void, decltype(&free)> bounce(memory, &free);
    Scratch scratch;
    std::vector<Job> jobs;
    jobs.reserve(32);  // a layer has no more matrices
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        work_.wait(lock, [&] { return stop_ || any_queued(); });
        if (stop_) break;
        take(jobs);
        ++reading_;
        lock.unlock();
        std::string fault;
        const uint64_t started = now_ns();
        bool ok = false;
        try {
            ok = read(jobs, static_cast<uint8_t *>(memory), scratch, fault);
        } catch (const std::exception & error) {
            fault = error.what();
        }
        const uint64_t took = now_ns() - started;
        lock.lock();
        stats_.read_ns += took;
        --reading_;
        if (ok) {
            stats_.reads += 1;
            for (const Job & job : jobs) {
                stats_.bytes += job.slice->stored_bytes(job.expert);
                finish(job, State::ready);
            }
        } else {
            give_up(jobs, fault);
        }
        if (waiting_ > 0 || failed()) arrived_.notify_all();
    }
}

// The most urgent matrix, and those of the same expert that one read can bring with it.
void ExpertStore::take(std::vector<Job> & jobs) {
    std::deque<Job> & from = *std::find_if(std::begin(queues_), std::end(queues_), [](const std::deque<Job> & q) { return !q.empty(); });
    jobs.assign(1, from.front());
    from.pop_front();
    const Job first = jobs.front();
    state(first).store(State::reading, std::memory_order_relaxed);
    if (first.place < 0) return;
    Span span = Span{}.with(*first.slice, first.expert);
    for (auto other = from.begin(); other != from.end();) {
        const bool beside = other->slice->layer == first.slice->layer && other->expert == first.expert &&
                            other->place == first.place && other->slice->file == first.slice->file &&
                            span.with(*other->slice, other->expert).worth_one_read();
        if (!beside) {
            ++other;
            continue;
        }
        span = span.with(*other->slice, other->expert);
        state(*other).store(State::reading, std::memory_order_relaxed);
        jobs.push_back(*other);
        other = from.erase(other);
    }
    Pool::Slot & content = pools_[static_cast<size_t>(params_.pools[static_cast<size_t>(first.slice->layer)])].content[static_cast<size_t>(first.place)];
    if (content.prefetched && !content.counted && first.urgency == Urgency::ahead) {
        content.counted = true;
        ++stats_.prefetched;
    }
}

// A read has failed. What no step waits for concerns no request: its slot is given up, and that is all.
void ExpertStore::give_up(const std::vector<Job> & jobs, const std::string & fault) {
    const Job & first = jobs.front();
    bool needed = first.urgency == Urgency::now;
    if (first.place >= 0) {
        const int pool = params_.pools[static_cast<size_t>(first.slice->layer)];
        needed = needed || pools_[static_cast<size_t>(pool)].content[static_cast<size_t>(first.place)].wanted;
    }
    if (needed) {
        if (error_.empty()) error_ = fault;
        failed_.store(true, std::memory_order_release);
    } else {
        ahead_error_ = fault;
        std::deque<Job> & rest = queue(first.urgency);
        const auto same = [&](const Job & job) {
            return job.place == first.place && params_.pools[static_cast<size_t>(job.slice->layer)] == params_.pools[static_cast<size_t>(first.slice->layer)];
        };
        for (const Job & job : rest)
            if (same(job)) finish(job, State::failed);
        rest.erase(std::remove_if(rest.begin(), rest.end(), same), rest.end());
    }
    for (const Job & job : jobs) finish(job, State::failed);
}

void ExpertStore::finish(const Job & job, State end) {
    state(job).store(end, std::memory_order_release);
    if (job.place < 0) return;
    const int pool = params_.pools[static_cast<size_t>(job.slice->layer)];
    Pool::Slot & content = pools_[static_cast<size_t>(pool)].content[static_cast<size_t>(job.place)];
    content.failed = content.failed || end != State::ready;
    if (--content.pending > 0) return;
    residency_->set_busy(pool, job.place, false);
    if (content.failed) {
        residency_->forget(content.layer, content.expert);
        content = {};
    }
}

bool ExpertStore::read(const std::vector<Job> & jobs, uint8_t * bounce, Scratch & scratch, std::string & fault) {
    Span span;
    for (const Job & job : jobs) span = span.with(*job.slice, job.expert);
    const Job & first = jobs.front();
    const bool straight = jobs.size() == 1 && first.slice->straight(first.expert);
    uint8_t * const target = straight ? address(first) - first.slice->lead(first.expert) : bounce;
    if (target == nullptr || (!straight && span.sector_bytes() > reader_bytes_.bounce)) {
        fault = "no memory to read experts into";
        return false;
    }
    if (!files_->read(first.slice->file, span.begin, span.end - span.begin, target, fault)) {
        fault = "cannot read expert " + std::to_string(first.expert) + " of " + first.slice->name + " " + fault;
        return false;
    }
    return std::all_of(jobs.begin(), jobs.end(), [&](const Job & job) {
        return deliver(job, target + span.begin % kSector + (job.slice->offset_of(job.expert) - span.begin), scratch, fault);
    });
}

// Puts a matrix that has been read in its place. False if it is not what it was when its checksum was made.
bool ExpertStore::deliver(const Job & job, const uint8_t * matrix, Scratch & scratch, std::string & fault) {
    const ExpertSlice & slice = *job.slice;
    if (!params_.checksums.empty()) {
        const auto number = static_cast<size_t>(&slice - params_.slices.data());
        const size_t place = number * static_cast<size_t>(params_.experts) + static_cast<size_t>(job.expert);
        if (crc32c(matrix, slice.stored_bytes(job.expert)) != params_.checksums[place]) {
            fault = "expert " + std::to_string(job.expert) + " of " + slice.name + " is damaged: it is not what its checksum was made of";
            return false;
        }
    }
    uint8_t * const target = address(job);
    const auto trial = static_cast<size_t>(slice.layer) * static_cast<size_t>(params_.experts) + static_cast<size_t>(job.expert);
    int width = slice.width_of(job.expert);
    if (width == 0 && !params_.trial_widths.empty() && can_narrow(slice.type, params_.trial_widths[trial])) {
        width = params_.trial_widths[trial];
        scratch.narrow.resize(narrow_size(slice.type, slice.columns, slice.rows, width));
        narrow(slice.type, slice.columns, slice.rows, width, matrix, scratch.narrow.data());
        matrix = scratch.narrow.data();
    }
    if (width != 0) {
        scratch.wide.resize(std::max<size_t>(scratch.wide.size(), slice.packed ? slice.bytes : 0));
        uint8_t * const wide = slice.packed ? scratch.wide.data() : target;
        widen(slice.type, slice.columns, slice.rows, width, matrix, wide);
        matrix = wide;
    }
    if (slice.packed)
        pack(slice.type, slice.columns, slice.rows, matrix, target);
    else if (target != matrix)
        std::memcpy(target, matrix, slice.bytes);
    return true;
}

uint8_t * ExpertStore::address(const Job & job) const {
    const ExpertSlice & slice = *job.slice;
    if (job.place < 0) return stream_ + static_cast<size_t>(~job.place) * slice.extent + slice.lead(job.expert);
    const Pool & pool = pools_[static_cast<size_t>(params_.pools[static_cast<size_t>(slice.layer)])];
    return pool.base + static_cast<size_t>(job.place) * pool.slot_bytes + slice.start + slice.lead(job.expert);
}

std::atomic<ExpertStore::State> & ExpertStore::slot_state(const ExpertSlice & slice, int slot) {
    const Pool & pool = pools_[static_cast<size_t>(params_.pools[static_cast<size_t>(slice.layer)])];
    return pool.states[static_cast<size_t>(slot * pool.parts + slice.index)];
}

std::atomic<ExpertStore::State> & ExpertStore::state(const Job & job) {
    return job.place < 0 ? cells_[static_cast<size_t>(~job.place)] : slot_state(*job.slice, job.place);
}

}  // namespace edgellm
