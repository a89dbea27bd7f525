// The experts of a MoE model that is larger than memory: which are in memory, and the reads that bring them there.
//
// A layer's experts have a matrix in each of the layer's stacked tensors (gate, up, down, or two of them merged). An
// expert in memory has a slot, with a part for each of its matrices; slots of the same size make up a pool. What lies in
// which slot is decided by the residency policy (residency.h). Reader threads bring the matrices in one by one, straight
// from the disk into the slot where the layout allows it, and a multiplication begins with those that are there.
//
// A step may need more experts of a layer than there are slots. The rest is streamed: each multiplication reads the one
// matrix that it needs into a cell of a small area, in waves of half the area, so that one half is read while the other
// is used. So a layer of any width can be computed with any budget, and no matrix is read twice in a step.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "expert_files.h"
#include "lookahead.h"
#include "pair_table.h"
#include "residency.h"

namespace edgellm {

struct ExpertStoreParams {
    int layers, experts;
    std::vector<ExpertSlice> slices;
    std::vector<std::string> files;
    std::vector<int> pools;  // (layers,): the pool of the layer's experts
    std::vector<int> slots;  // (pools,)
    size_t stream_bytes;     // at least two cells of the largest matrix
    int readers;             // threads
    bool direct;             // unbuffered reads, where the file system has them
    std::vector<uint32_t> checksums{};  // (slices, experts): CRC-32C of what is read; empty: it is not checked
    // (layers, experts): bits to which what is read is narrowed and widened again, to see what that does; empty, 0: not.
    std::vector<uint8_t> trial_widths{};
};

struct ExpertStats {
    uint64_t visits, needed, hits, loads, streamed;       // experts of layers of steps
    uint64_t prefetched, prefetch_used, prefetch_wasted;  // experts
    uint64_t reads, bytes;
    uint64_t stall_ns, read_ns;  // the first thread's waiting; time that readers spent in reads
};

// Memory that a reader takes for what it does not read straight into its place: for what it reads, and for a matrix that
// is widened before it is packed.
struct ReaderBytes {
    size_t bounce = 0, wide = 0;
};
ReaderBytes reader_bytes(const std::vector<ExpertSlice> & slices, int experts);

class ExpertStore {
  public:
    enum class State : uint8_t { absent, queued, reading, ready, failed };

    struct Task {
        int32_t expert;
        const uint8_t * data;
        const std::atomic<State> * state;
    };

    // Opens the files and reserves the memory. Throws std::system_error, std::invalid_argument.
    explicit ExpertStore(ExpertStoreParams params);
    ~ExpertStore();
    ExpertStore(const ExpertStore &) = delete;
    ExpertStore & operator=(const ExpertStore &) = delete;

    // nullptr if there is no such tensor.
    const ExpertSlice * slice(const std::string & name) const;
    const ExpertStoreParams & params() const { return params_; }

    // --- one multiplication at a time; called by its first thread
    // It needs these distinct experts. Their matrices come in waves; the first is ready to be asked for.
    void begin(const ExpertSlice & slice, const int32_t * experts, size_t n);
    const std::vector<Task> & wave() const { return tasks_; }
    // Nobody uses the last wave's matrices any more: makes the next wave. False if there is none.
    bool next();
    // Whether `next` would make a wave.
    bool more() const { return streamed_at_ < streamed_.size(); }
    // The coming visit of the layer will likely need these, most likely first: at most `limit` are read ahead. With
    // `ranks`, the place of each in the router's order, those of ranks that have mostly been wrong are not read.
    void prefetch(int layer, const int32_t * experts, size_t n, int limit, const int32_t * ranks = nullptr);
    // Fills free slots with these, the first of them first, while there is nothing else to read.
    void preload(int layer, const int32_t * experts, size_t n);
    // Whether `begin` was the first of a layer's visit.
    bool fresh_visit() const { return fresh_; }

    // What is known of the routers; nullptr: nothing.
    Lookahead * lookahead() { return lookahead_.get(); }
    void set_lookahead(std::unique_ptr<Lookahead> lookahead) { lookahead_ = std::move(lookahead); }
    // Which experts follow which, for where the routers cannot be used; nullptr where every expert has a slot.
    PairTable * table() { return table_.get(); }
    // What foresaw experts last, to be told of. From any thread.
    enum class Predictor : uint8_t { none, routers, table };
    void set_predictor(Predictor predictor) { predictor_.store(predictor, std::memory_order_relaxed); }
    Predictor predictor() const { return predictor_.load(std::memory_order_relaxed); }
    // Whether to read ahead, and whether to keep a log of what was chosen and foreseen. Between steps.
    void set_ahead(bool on) { ahead_on_ = on; }
    bool ahead_on() const { return ahead_on_; }
    void set_log(bool on) { log_on_ = on; }
    bool log_on() const { return log_on_; }
    // Appends to the log: (distance, or -1 for what the router chose), layer, token, how many, experts.
    void log(int distance, int layer, int token, const int32_t * experts, int n);
    std::vector<int32_t> take_log() { return std::move(log_); }
    // For benchmarks: these experts, (layers, used), in place of the routers' choice, and what look-ahead is to foresee,
    // the same shape or empty. Empty routes: the routers choose. Between steps.
    void set_route(std::vector<int32_t> route, std::vector<int32_t> foreseen);
    const int32_t * route(int layer, size_t used) const { return row_of(route_, layer, used); }
    const int32_t * foreseen(int layer, size_t used) const { return row_of(foreseen_, layer, used); }
    // Whether more may be read ahead: the readers have little to do.
    bool idle();

    // --- any thread
    // Waits for a matrix. False if it cannot be read; `counts`: the time is a stall.
    bool wait(const Task & task, bool counts);
    // A read has failed, or the graph used an expert tensor in an unknown way: results are worthless until `take_error`.
    bool failed() const { return failed_.load(std::memory_order_acquire); }
    void fail(const std::string & message);
    std::string take_error();

    ExpertStats stats();
    uint64_t reads();                 // stats().reads
    std::vector<uint32_t> counts();   // (layers, experts): visits that needed each
    size_t resident_bytes();
    bool deleted() const { return files_->deleted(); }
    bool direct() const { return files_->direct(); }

    // Tensors that llama.cpp has placed here, while a model is loaded; and those it wanted to use in another way.
    void claim(const ExpertSlice & slice) { claimed_[static_cast<size_t>(slice.layer)] = 1; }
    const std::vector<uint8_t> & claimed() const { return claimed_; }  // (layers,)
    void refuse(const std::string & name) { refused_ = name; }
    const std::string & refused() const { return refused_; }

    std::atomic<int64_t> next_chunk{0};  // of the running multiplication

  private:
    struct Pool {
        uint8_t * base = nullptr;
        size_t slot_bytes = 0, mapped_bytes = 0;
        int slots = 0, parts = 0;
        std::unique_ptr<std::atomic<State>[]> states;  // (slots, parts)
        struct Slot {
            int32_t layer = -1, expert = -1;
            int16_t pending = 0;  // reads that are queued or running
            bool prefetched = false;  // and not needed since
            bool counted = false;     // as prefetched: its first read has begun
            bool wanted = false;      // by a step, since it was read: a read that fails fails the step
            bool failed = false;
            int16_t rank = -1;  // in the prediction that it was read for
        };
        std::vector<Slot> content;
    };
    enum class Urgency : uint8_t { now, ahead, idle };
    struct Job {
        const ExpertSlice * slice;
        int32_t expert;
        int32_t place;  // a slot; ~cell for a cell of the streaming area
        Urgency urgency;
    };

    struct Scratch {  // a reader's
        std::vector<uint8_t> narrow, wide;
    };

    static const int32_t * row_of(const std::vector<int32_t> & rows, int layer, size_t used) {
        const size_t end = (static_cast<size_t>(layer) + 1) * used;
        return end <= rows.size() ? rows.data() + end - used : nullptr;
    }
    void lay_out();
    void close_all() noexcept;
    void start_visit(const ExpertSlice & slice, const int32_t * experts, size_t n);
    bool worth_reading(int32_t rank);
    void judge(const Pool::Slot & content, bool used);
    void drop_stale(int layer, const int32_t * experts, size_t n);
    void occupy(int pool, const Residency::Load & load, int layer, bool prefetched);
    void request(const ExpertSlice & slice, int32_t expert, int slot, Urgency urgency);
    void promote(const ExpertSlice & slice, int32_t expert, int slot);
    void stream_half();
    std::deque<Job> & queue(Urgency urgency) { return queues_[static_cast<size_t>(urgency)]; }
    void work();
    bool any_queued() const;
    void take(std::vector<Job> & jobs);
    void give_up(const std::vector<Job> & jobs, const std::string & fault);
    void finish(const Job & job, State end);
    bool read(const std::vector<Job> & jobs, uint8_t * bounce, Scratch & scratch, std::string & fault);
    bool deliver(const Job & job, const uint8_t * matrix, Scratch & scratch, std::string & fault);
    uint8_t * address(const Job & job) const;
    std::atomic<State> & state(const Job & job);
    std::atomic<State> & slot_state(const ExpertSlice & slice, int slot);

    ExpertStoreParams params_;
    std::unordered_map<std::string, const ExpertSlice *> names_;
    std::vector<std::vector<const ExpertSlice *>> layers_;
    std::vector<Pool> pools_;
    std::unique_ptr<ExpertFiles> files_;
    ReaderBytes reader_bytes_;
    uint8_t * stream_ = nullptr;
    size_t stream_mapped_ = 0;
    std::unique_ptr<std::atomic<State>[]> cells_;
    std::vector<uint8_t> claimed_;
    std::string refused_;

    std::mutex mutex_;
    std::condition_variable work_, arrived_;
    int waiting_ = 0, reading_ = 0;
    bool stop_ = false;
    std::unique_ptr<Residency> residency_;
    std::unique_ptr<Lookahead> lookahead_;
    std::unique_ptr<PairTable> table_;
    std::atomic<Predictor> predictor_{Predictor::none};
    bool ahead_on_ = false, log_on_ = false;
    std::vector<int32_t> log_, route_, foreseen_, worth_;
    std::deque<Job> queues_[3];  // by urgency
    ExpertStats stats_{};
    struct Record {
        int32_t used = 0, wasted = 0, skipped = 0;
    };
    std::vector<Record> records_;  // by rank: what came of reading ahead
    std::vector<uint32_t> counts_;
    std::string error_;
    std::string ahead_error_;  // why the last read that nobody waited for has failed
    std::atomic<bool> failed_{false};
    std::vector<std::thread> readers_;

    // The running multiplication, touched by its first thread only (tasks_: read by all, between barriers).
    const ExpertSlice * current_ = nullptr;
    int layer_ = -1;
    uint32_t seen_ = 0;  // the layer's tensors that this visit has multiplied by
    bool fresh_ = false;
    std::vector<Task> tasks_;
    std::vector<int32_t> streamed_;
    size_t streamed_at_ = 0, requested_ = 0, half_ = 0;
};

}  // namespace edgellm
