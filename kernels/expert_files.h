// The files that experts are read from: unbuffered where the file system allows it, and watched for changes.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace edgellm {

constexpr size_t kSector = 4096;  // what unbuffered reads are aligned to

inline size_t rounded(size_t n, size_t to) { return (n + to - 1) / to * to; }

// One stacked tensor of a layer.
struct ExpertSlice {
    std::string name;
    int32_t type;
    int64_t columns, rows;
    int layer, index;   // MoE layers count from 0; `index` numbers the tensors of a layer
    int file;
    uint64_t offset, bytes;  // of expert 0's matrix in the file, and of each as the type has it
    bool packed;             // lies in memory as packed.h has it
    std::vector<uint64_t> offsets;  // (experts,): where each one's matrix is; empty: they follow each other
    std::vector<uint8_t> widths;    // (experts,): bits to which each was narrowed in the file (narrow.h); empty, 0: not

    size_t start = 0, extent = 0;  // its part of a slot, in bytes; filled in by the store

    size_t memory_bytes() const;
    uint64_t offset_of(int32_t expert) const {
        return offsets.empty() ? offset + static_cast<uint64_t>(expert) * bytes : offsets[static_cast<size_t>(expert)];
    }
    int width_of(int32_t expert) const { return widths.empty() ? 0 : widths[static_cast<size_t>(expert)]; }
    size_t stored_bytes(int32_t expert) const;
    // Whether it is read to where it is used.
    bool straight(int32_t expert) const { return !packed && width_of(expert) == 0; }
    // Bytes from the start of its part to the matrix: unbuffered reads begin at whole sectors of the file.
    size_t lead(int32_t expert) const { return straight(expert) ? offset_of(expert) % kSector : 0; }
};

// What one read brings: a matrix, or several of an expert that lie beside each other in the file.
struct Span {
    uint64_t begin = UINT64_MAX, end = 0, bytes = 0;

    Span with(const ExpertSlice & slice, int32_t expert) const;
    // Small reads are slow because of their number; large ones are not, and of them the first matrix can be multiplied by
    // while the second is read.
    bool worth_one_read() const;
    size_t sector_bytes() const;  // of the sectors that one of its size may touch
};

constexpr uint64_t kWholeBytes = uint64_t{1} << 20;  // most that is read at once of several matrices

// Bytes of memory that a matrix of this kind takes in a slot or a cell.
size_t slice_extent(const ExpertSlice & slice);

class ExpertFiles {
  public:
    // Opens them. `direct`: reads go past the page cache, where they can. Throws std::system_error.
    ExpertFiles(std::vector<std::string> paths, bool direct);
    ~ExpertFiles();
    ExpertFiles(const ExpertFiles &) = delete;
    ExpertFiles & operator=(const ExpertFiles &) = delete;

    bool direct() const { return direct_; }
    // Whether a file has lost its name. What is read is still what it was.
    bool deleted() const { return deleted_.load(std::memory_order_relaxed); }
    uint64_t bytes(int file) const { return files_[static_cast<size_t>(file)].bytes; }

    // Reads `bytes` from `offset` of a file to `target`, at a sector's border, plus offset % kSector. False, and what is
    // wrong in `fault`, for clients to see. Any thread.
    bool read(int file, uint64_t offset, size_t bytes, uint8_t * target, std::string & fault);

  private:
    struct File {
        std::string name;
        int fd = -1;
        uint64_t bytes = 0;
        int64_t modified_ns = 0;
    };

    bool open_all(const std::vector<std::string> & paths);
    bool unchanged(const File & file);
    void close_all() noexcept;

    std::vector<File> files_;
    bool direct_;
    std::atomic<bool> deleted_{false};
};

}  // namespace edgellm
