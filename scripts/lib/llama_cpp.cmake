# Read by CMake inside llama-cpp-python's project() (CMAKE_PROJECT_llama_cpp_INCLUDE). Its CMakeLists forces the cache entry
# LLAMA_BUILD_COMMON on; a normal variable of that name comes first (policy CMP0126), so that llama.cpp's command-line
# helper library, half of the compile time and used by nothing here, is left out.
set(LLAMA_BUILD_COMMON OFF)
