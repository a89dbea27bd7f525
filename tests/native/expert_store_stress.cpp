// Several threads multiply by experts (they check their bytes) while others read them, look ahead and ask for figures.
// scripts/test_native compiles this with the thread sanitizer, and with the address sanitizer. Arguments: a folder.
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "expert_store.h"
#include "narrow.h"
#include "packed.h"

using edgellm::ExpertSlice;
using edgellm::ExpertStore;

namespace {

constexpr int kThreads = 3, kLayers = 4, kExperts = 12, kSteps = 70;
constexpr int32_t kFloat = 0;
constexpr uint8_t kWidth = 4;

uint8_t expected(const ExpertSlice & slice, int expert, size_t i) {
    return static_cast<uint8_t>(slice.layer * 57 + slice.index * 31 + expert * 7 + static_cast<int>(i % 251));
}

struct Fixture {
    std::string path;
    std::vector<ExpertSlice> slices;
};

// Matrices of odd sizes at odd places; those of type Q8_0 are packed on their way. `beside`: as in a pack, an expert's
// matrices follow each other, and each expert begins at a sector; of those of type Q8_0 every third is narrowed.
Fixture write_file(const std::string & folder, bool packed, bool beside) {
    Fixture f{folder + "/experts.bin", {}};
    std::vector<char> content;
    uint64_t offset = 0;
    for (int layer = 0; layer < kLayers; ++layer)
        for (int part = 0; part < 3; ++part) {
            const int64_t columns = packed ? 64 : 33, rows = packed ? 32 : 40 + part;
            const uint64_t bytes = packed ? static_cast<uint64_t>(rows * columns / 32 * 34) : static_cast<uint64_t>(rows * columns * 4);
            const uint64_t record = 8 * edgellm::kSector;
            ExpertSlice slice{"l" + std::to_string(layer) + "p" + std::to_string(part), packed ? int32_t{edgellm::Q8_0} : kFloat,
                              columns, rows, layer, part, 0, offset, bytes, packed, {}, {}};
            for (uint64_t e = 0; beside && e < kExperts; ++e)
                slice.offsets.push_back((static_cast<uint64_t>(layer) * kExperts + e) * record + static_cast<uint64_t>(part) * (bytes + 17));
            for (int e = 0; beside && packed && e < kExperts; ++e) slice.widths.push_back(e % 3 == 0 ? kWidth : 0);
            for (int e = 0; e < kExperts; ++e) {
                std::vector<uint8_t> matrix(bytes), stored(slice.stored_bytes(e));
                for (size_t i = 0; i < bytes; ++i) matrix[i] = expected(slice, e, i);
                if (slice.width_of(e) != 0) edgellm::narrow(slice.type, columns, rows, kWidth, matrix.data(), stored.data());
                else stored = matrix;
                const size_t at = slice.offset_of(e);
                content.resize(std::max(content.size(), at + stored.size()));
                std::copy(stored.begin(), stored.end(), content.begin() + static_cast<std::ptrdiff_t>(at));
            }
            offset += bytes * kExperts;
            f.slices.push_back(slice);
        }
    std::ofstream(f.path, std::ios::binary).write(content.data(), static_cast<std::streamsize>(content.size()));
    return f;
}

struct Shared {
    ExpertStore & store;
    pthread_barrier_t barrier;
    const ExpertSlice * slice = nullptr;
    std::vector<uint8_t> packed;  // what the packed matrices must be, by expert
    bool faults = false;
    std::atomic<long> checked{0}, wrong{0};
};

void check(Shared & s, const ExpertStore::Task & task, size_t from, size_t to) {
    std::vector<uint8_t> raw(s.slice->bytes), packed;
    for (size_t i = 0; i < raw.size(); ++i) raw[i] = expected(*s.slice, task.expert, i);
    if (s.slice->width_of(task.expert) != 0) {
        std::vector<uint8_t> stored(s.slice->stored_bytes(task.expert));
        edgellm::narrow(s.slice->type, s.slice->columns, s.slice->rows, kWidth, raw.data(), stored.data());
        edgellm::widen(s.slice->type, s.slice->columns, s.slice->rows, kWidth, stored.data(), raw.data());
    }
    const uint8_t * want = raw.data();
    if (s.slice->packed) {
        packed.resize(s.slice->memory_bytes());
        edgellm::pack(s.slice->type, s.slice->columns, s.slice->rows, raw.data(), packed.data());
        want = packed.data();
    }
    const size_t size = s.slice->memory_bytes();
    if (std::memcmp(task.data + size * from / 4, want + size * from / 4, size * to / 4 - size * from / 4) != 0) ++s.wrong;
    ++s.checked;
}

void compute(Shared & s, int number) {
    std::mt19937 draw(1);
    for (int step = 0; step < kSteps; ++step)
        for (int layer = 0; layer < kLayers; ++layer) {
            std::vector<int32_t> experts;
            const unsigned one_in = step % 7 == 0 ? 1 : 4;  // now and then all of them
            for (int32_t e = 0; e < kExperts; ++e)
                if (draw() % one_in == 0) experts.push_back(e);
            if (experts.empty()) experts.push_back(static_cast<int32_t>(draw() % kExperts));
            for (int part = 0; part < 3; ++part) {
                if (number == 0) {
                    s.slice = s.store.slice("l" + std::to_string(layer) + "p" + std::to_string(part));
                    s.store.begin(*s.slice, experts.data(), experts.size());
                    s.store.next_chunk = 0;
                    if (s.faults && draw() % 97 == 0) s.store.fail("an injected fault");
                    if (part == 0 && layer + 1 < kLayers) s.store.prefetch(layer + 1, experts.data(), experts.size(), 3);
                } else if (s.faults) {
                    draw();
                }
                for (bool more = true; more;) {
                    pthread_barrier_wait(&s.barrier);
                    const auto chunks = static_cast<int64_t>(s.store.wave().size()) * 4;
                    for (int64_t c; (c = s.store.next_chunk++) < chunks;) {
                        const ExpertStore::Task & task = s.store.wave()[static_cast<size_t>(c / 4)];
                        if (s.store.wait(task, number == 0)) check(s, task, static_cast<size_t>(c % 4), static_cast<size_t>(c % 4) + 1);
                    }
                    more = s.store.more();
                    pthread_barrier_wait(&s.barrier);
                    if (number == 0 && more) {
                        s.store.next();
                        s.store.next_chunk = 0;
                    }
                }
            }
            if (number == 0 && layer == kLayers - 1 && s.store.failed()) s.store.take_error();
        }
}

bool stress(const Fixture & f, int slots, bool direct, bool faults) {
    size_t largest = 0;
    for (const ExpertSlice & slice : f.slices) largest = std::max(largest, edgellm::slice_extent(slice));
    ExpertStore store({kLayers, kExperts, f.slices, {f.path}, {0, 0, 0, 0}, {slots}, 2 * largest + largest / 2, 3, direct});
    for (int layer = 0; layer < kLayers; ++layer) {
        const int32_t hot[] = {3, 1, 7};
        store.preload(layer, hot, 3);
    }
    Shared shared{store, {}};
    shared.faults = faults;
    pthread_barrier_init(&shared.barrier, nullptr, kThreads);
    std::atomic<bool> over{false};
    std::thread watcher([&] {
        while (!over) {
            store.stats();
            store.resident_bytes();
            store.counts();
            std::this_thread::yield();
        }
    });
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) threads.emplace_back(compute, std::ref(shared), i);
    for (std::thread & thread : threads) thread.join();
    over = true;
    watcher.join();
    pthread_barrier_destroy(&shared.barrier);
    const edgellm::ExpertStats stats = store.stats();
    std::printf("slots %2d direct %d faults %d: %ld checks, %ld wrong, %llu hits of %llu, %llu streamed, %llu ahead\n", slots, direct,
                faults, shared.checked.load(), shared.wrong.load(), static_cast<unsigned long long>(stats.hits),
                static_cast<unsigned long long>(stats.needed), static_cast<unsigned long long>(stats.streamed),
                static_cast<unsigned long long>(stats.prefetched));
    std::fflush(stdout);
    return shared.wrong == 0 && shared.checked > 0 && stats.needed == stats.hits + stats.loads + stats.streamed + stats.prefetch_used;
}

}  // namespace

int main(int argc, char ** argv) {
    if (argc != 2) return 2;
    bool good = true;
    for (const int kind : {0, 1, 2, 3}) {
        const Fixture f = write_file(argv[1], kind % 2 == 1, kind >= 2);
        for (const int slots : {0, 1, 7, 20, kLayers * kExperts})
            for (const bool direct : {false, true}) good = stress(f, slots, direct, false) && good;
        good = stress(f, 7, true, true) && good;
    }
    std::printf("%s\n", good ? "good" : "BAD");
    return good ? 0 : 1;
}
