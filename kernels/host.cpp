#include "host.h"

#include <vector>

namespace edgellm {
namespace {

Host found_host{};

}  // namespace

void set_host(const Host & found) { found_host = found; }

const Host & host() { return found_host; }

void add_buffer_type(ggml::BufferType * type) {
    auto & types = reinterpret_cast<std::vector<ggml::BufferType *> & (*)()>(found_host.extra_buffer_types)();
    types.insert(types.begin(), type);
}

}  // namespace edgellm
