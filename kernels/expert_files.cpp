#include "expert_files.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "narrow.h"
#include "packed.h"

namespace edgellm {
namespace {

#ifdef O_DIRECT
constexpr bool kCanBeDirect = true;
#else
constexpr bool kCanBeDirect = false;
#endif

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

size_t ExpertSlice::stored_bytes(int32_t expert) const {
    const int width = width_of(expert);
    return width == 0 ? bytes : narrow_size(type, columns, rows, width);
}

Span Span::with(const ExpertSlice & slice, int32_t expert) const {
    const uint64_t at = slice.offset_of(expert), size = slice.stored_bytes(expert);
    return {std::min(begin, at), std::max(end, at + size), bytes + size};
}

bool Span::worth_one_read() const { return end - begin <= std::min(kWholeBytes, bytes + kSector); }

size_t Span::sector_bytes() const { return rounded(end - begin + kSector - 1, kSector); }

size_t slice_extent(const ExpertSlice & slice) {
    return slice.packed ? rounded(slice.memory_bytes(), kSector) : rounded(slice.bytes + kSector - 1, kSector);
}

ExpertFiles::ExpertFiles(std::vector<std::string> paths, bool direct) : direct_(direct && kCanBeDirect) {
    if (open_all(paths)) return;
    close_all();  // one of them has no unbuffered reads: then none is read so
    direct_ = false;
    open_all(paths);
}

// False if a file cannot be read directly. Throws std::system_error, with the file's name, if it cannot be opened.
bool ExpertFiles::open_all(const std::vector<std::string> & paths) {
    for (const std::string & path : paths) {
        File file{path.substr(path.find_last_of('/') + 1), open_file(path, direct_), 0, 0};
        const int why = errno;
        const bool direct = file.fd >= 0 ? !direct_ || reads_directly(file.fd) : why != EINVAL || !direct_;
        struct stat s {};
        const bool known = file.fd >= 0 && fstat(file.fd, &s) == 0;
        file.bytes = static_cast<uint64_t>(s.st_size);
        file.modified_ns = modified_ns(s);
        files_.push_back(std::move(file));
        if (!direct) return false;
        if (known) continue;
        const std::string name = files_.back().name;
        close_all();
        throw std::system_error(why, std::generic_category(), name);
    }
    return true;
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

bool ExpertFiles::read(int number, uint64_t offset, size_t bytes, uint8_t * target, std::string & fault) {
    const File & file = files_[static_cast<size_t>(number)];
    const size_t lead = offset % kSector, wanted = lead + bytes, size = rounded(wanted, kSector);
    size_t done = 0;
    int error = 0;
    while (done < wanted && error == 0) {
        const ssize_t n = pread(file.fd, target + done, size - done, static_cast<off_t>(offset - lead + done));
        if (n < 0 && errno == EINTR) continue;
        error = n < 0 ? errno : 0;
        size_t next = done + static_cast<size_t>(std::max<ssize_t>(n, 0));
        if (direct_ && next < wanted) next -= next % kSector;  // unbuffered reads go on at whole sectors
        if (next == done) break;
        done = next;
    }
#ifdef POSIX_FADV_DONTNEED
    if (!direct_) posix_fadvise(file.fd, static_cast<off_t>(offset - lead), static_cast<off_t>(size), POSIX_FADV_DONTNEED);
#endif
    fault = "from " + file.name + ": ";
    if (error != 0)
        fault += std::generic_category().message(error);
    else if (!unchanged(file))  // looked at afterwards: what was changed before or during the read is noticed
        fault += "it changed while it was in use; load the model again";
    else if (done < wanted)
        fault += "it ends before that";
    else
        fault.clear();
    return fault.empty();
}

}  // namespace edgellm
