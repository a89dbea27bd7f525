#include "expert_files.h"

#include <cerrno>
#include <cstdlib>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "packed.h"

namespace edgellm {
namespace {

size_t rounded(size_t n, size_t to) { return (n + to - 1) / to * to; }

int64_t modified_ns(const struct stat & s) {
#ifdef __APPLE__
    return int64_t{s.st_mtimespec.tv_sec} * 1000000000 + s.st_mtimespec.tv_nsec;
#else
    return int64_t{s.st_mtim.tv_sec} * 1000000000 + s.st_mtim.tv_nsec;
#endif
}

int open_file(const std::string & path, bool direct) {
    int flags = O_RDONLY | O_CLOEXEC;
#ifdef O_DIRECT
    if (direct) flags |= O_DIRECT;
#endif
    return open(path.c_str(), flags);
}

// Whether an unbuffered read works: file systems may take the flag and refuse the read.
bool reads_directly(int fd) {
    void * page = nullptr;
    if (posix_memalign(&page, kSector, kSector) != 0) return false;
    const bool works = pread(fd, page, kSector, 0) > 0;
    free(page);
    return works;
}

}  // namespace

size_t ExpertSlice::memory_bytes() const { return packed ? packed_size(type, columns, rows) : bytes; }

size_t slice_extent(const ExpertSlice & slice) {
    return slice.converted() ? rounded(slice.memory_bytes(), kSector) : rounded(slice.bytes + kSector - 1, kSector);
}

ExpertFiles::ExpertFiles(std::vector<std::string> paths, bool direct) : direct_(direct) {
    for (const std::string & path : paths) {
        File file{path.substr(path.find_last_of('/') + 1), open_file(path, direct_), 0, 0};
        if (direct_ && (file.fd < 0 ? errno == EINVAL : !reads_directly(file.fd))) {
            if (file.fd >= 0) close(file.fd);
            direct_ = false;
            file.fd = open_file(path, false);
        }
        struct stat s {};
        const bool known = file.fd >= 0 && fstat(file.fd, &s) == 0;
        const int why = errno;
        file.bytes = static_cast<uint64_t>(s.st_size);
        file.modified_ns = modified_ns(s);
        files_.push_back(std::move(file));
        if (known) continue;
        close_all();
        throw std::system_error(why, std::generic_category(), path);
    }
}

ExpertFiles::~ExpertFiles() { close_all(); }

void ExpertFiles::close_all() noexcept {
    for (const File & file : files_)
        if (file.fd >= 0) close(file.fd);
    files_.clear();
}

bool ExpertFiles::unchanged(const File & file) {
    struct stat s {};
    if (fstat(file.fd, &s) != 0 || static_cast<uint64_t>(s.st_size) != file.bytes || modified_ns(s) != file.modified_ns) return false;
    if (s.st_nlink == 0) deleted_.store(true, std::memory_order_relaxed);
    return true;
}

bool ExpertFiles::read(const ExpertSlice & slice, int32_t expert, uint8_t * target, std::string & fault) {
    const File & file = files_[static_cast<size_t>(slice.file)];
    if (!unchanged(file)) {
        fault = file.name + " changed while it was in use; load the model again";
        return false;
    }
    const uint64_t offset = slice.offset + static_cast<uint64_t>(expert) * slice.bytes;
    const size_t lead = slice.file_lead(expert), wanted = lead + slice.bytes, size = rounded(wanted, kSector);
    for (size_t done = 0; done < wanted;) {
        const ssize_t n = pread(file.fd, target + done, size - done, static_cast<off_t>(offset - lead + done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            fault = "cannot read expert " + std::to_string(expert) + " of " + slice.name + " from " + file.name + ": " +
                    (n < 0 ? std::generic_category().message(errno) : std::string("the file ends before it"));
            return false;
        }
        done += static_cast<size_t>(n);
        if (done < wanted && done % kSector != 0) done -= done % kSector;  // unbuffered reads go on at whole sectors
    }
#ifdef POSIX_FADV_DONTNEED
    if (!direct_) posix_fadvise(file.fd, static_cast<off_t>(offset - lead), static_cast<off_t>(size), POSIX_FADV_DONTNEED);
#endif
    return true;
}

}  // namespace edgellm
