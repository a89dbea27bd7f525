// The parts of edgellm._kernels, each bound in a file of its own.
#pragma once

#include <nanobind/nanobind.h>

namespace edgellm {

void bind_attention(nanobind::module_ & m);   // attention_module.cpp
void bind_experts(nanobind::module_ & m);     // experts_module.cpp
void bind_narrow(nanobind::module_ & m);      // narrow_module.cpp
void bind_pair_table(nanobind::module_ & m);  // pair_table_module.cpp
void bind_residency(nanobind::module_ & m);   // residency_module.cpp
void bind_training(nanobind::module_ & m);    // training_module.cpp

}  // namespace edgellm
